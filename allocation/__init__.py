"""Choose one format for every unit under linear limits: the multiple-choice knapsack.

NumPy and SciPy only; nothing here imports torch.
"""

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.plans.solution import Answer, Solution, Status
from bitknap.allocation.problem.budget import Budget
from bitknap.allocation.problem.divisible import divisible
from bitknap.allocation.problem.format import Format, formats
from bitknap.allocation.problem.limit import Limit
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.problem.profiles import PROFILES, Profile, profile
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.problem.units import ROLES, Units
from bitknap.allocation.search.solver import Search
from bitknap.allocation.solvers.greedy import Greedy
from bitknap.allocation.solvers.ilp import Ilp
from bitknap.allocation.solvers.knapsack import Knapsack
from bitknap.allocation.solvers.solver import Solver
from bitknap.allocation.solvers.solving import solve
from bitknap.allocation.tradeoffs.frontier_path import Frontier, FrontierPoint, frontier
from bitknap.allocation.tradeoffs.profile_price import Price, price
from bitknap.allocation.tradeoffs.uniform_recipes import round_robin, uniform_plans

__all__ = [
    "PROFILES",
    "ROLES",
    "Answer",
    "BitPlan",
    "Budget",
    "CostTable",
    "Format",
    "Frontier",
    "FrontierPoint",
    "Greedy",
    "Ilp",
    "Knapsack",
    "Limit",
    "Price",
    "Problem",
    "Profile",
    "Search",
    "Solution",
    "Solver",
    "Status",
    "Units",
    "divisible",
    "formats",
    "frontier",
    "price",
    "profile",
    "round_robin",
    "solve",
    "uniform_plans",
]
