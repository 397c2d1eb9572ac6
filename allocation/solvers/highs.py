"""Solve one small integer program with HiGHS, through highspy.

The HiGHS inside SciPy 1.17 writes debug lines to standard output.
"""

from __future__ import annotations

import numpy as np

from bitknap.allocation.solvers.integer_program import TOLERANCE, Program, Result


def run(program: Program, gap: float, seconds: float) -> Result:
    """Solve by branch and cut.

    Args:
        program: the program to solve.
        gap: absolute gap at which to stop.
        seconds: time limit.
    """
    import highspy

    solver = highspy.Highs()
    options = {
        "output_flag": False,
        "mip_rel_gap": 0.0,
        "mip_abs_gap": max(gap, TOLERANCE),
        "mip_feasibility_tolerance": 1e-9,
        "time_limit": seconds,
        "random_seed": 0,
    }
    for name, value in options.items():
        solver.setOptionValue(name, value)
    count, width = int(program.row.max()) + 1, len(program.cost)
    height = len(program.bounds)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = width, count + height
    lp.col_cost_ = program.cost
    lp.col_lower_, lp.col_upper_ = np.zeros(width), np.ones(width)
    lp.row_lower_ = np.concatenate([np.ones(count), np.full(height, -np.inf)])
    lp.row_upper_ = np.concatenate([np.ones(count), program.bounds])
    lp.integrality_ = [highspy.HighsVarType.kInteger] * width
    # One column per option: its row, then its weights.
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.arange(width + 1) * (1 + height)
    lp.a_matrix_.index_ = np.column_stack(
        [program.row, np.tile(count + np.arange(height), (width, 1))]
    ).ravel()
    lp.a_matrix_.value_ = np.column_stack([np.ones(width), program.weights.T]).ravel()
    solver.passModel(lp)
    start = highspy.HighsSolution()
    start.col_value = program.start.astype(np.float64)
    solver.setSolution(start)
    solver.run()
    status, info = solver.getModelStatus(), solver.getInfo()
    infeasible = status == highspy.HighsModelStatus.kInfeasible
    if infeasible or info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return Result(picked=None, bound=-np.inf, finished=infeasible)
    picked = np.asarray(solver.getSolution().col_value) > 0.5
    done = status == highspy.HighsModelStatus.kOptimal
    return Result(picked=picked, bound=float(info.mip_dual_bound), finished=done)
