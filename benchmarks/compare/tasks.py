"""Tasks of the lm-evaluation-harness on each strategy's plan: extra figures that decide nothing.

Short answers hide damage that KL shows (methods.md#pitfalls, pitfall 15), and their errors are
large; they are included because people ask for them.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitknap.allocation import BitPlan
from bitknap.api.calibration import tokenizer_of
from bitknap.api.plan_measures import stored
from bitknap.benchmarks.compare.models import NOT_IN_MEMORY, Setting
from bitknap.errors import InputError
from bitknap.estimators.measuring.kl_replay import Replay
from bitknap.names import guess

# Batch size of questions.
_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """Tasks that plans are evaluated on.

    Attributes:
        names: names of tasks in lm-eval.
        folder: folder of custom tasks.
        limit: number of documents of each task; all when not given.
    """

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None

    def check(self) -> None:
        """Refuse unknown tasks, before spending hours on a comparison.

        Raises:
            InputError: lm-eval is not installed, or knows no such task.
        """
        if find_spec("lm_eval") is None:
            raise InputError(
                "--tasks: needs lm-eval; pip install 'bitknap[tasks]', or leave out --tasks"
            )
        known = _manager(self.folder).all_tasks
        missing = [name for name in self.names if name not in known]
        if missing:
            raise InputError(
                f"--tasks: lm-eval has no {', '.join(missing)}; write its own names, such as "
                f"piqa, or give the folder of yours with --task-path{guess(missing[0], known)}"
            )

    def scores(self, setting: Setting, plan: BitPlan | None) -> dict[str, dict[str, float]]:
        """Return each task's metrics for the model stored as a plan says, or as it is."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        replay, seed = setting.judge.sample, setting.options.seed
        if not isinstance(replay, Replay):
            raise InputError(NOT_IN_MEMORY)
        where: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if plan is not None:
            where = stored(replay, setting.evidence, plan)
        # lm-eval always draws bars and prints advice on stderr.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        with where, contextlib.redirect_stderr(io.StringIO()):
            language = HFLM(
                pretrained=replay.model,
                tokenizer=tokenizer_of(setting.source.folder),
                batch_size=_BATCH,
            )
            evaluated = simple_evaluate(
                model=language,
                tasks=list(self.names),
                task_manager=_manager(self.folder),
                limit=self.limit,
                bootstrap_iters=0,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        return {name: dict(_numbers(values)) for name, values in evaluated["results"].items()}


def _numbers(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in sorted(values.items()):
        metric = name.partition(",")[0]
        if isinstance(value, int | float) and not metric.endswith("_stderr") and metric != "alias":
            yield metric, float(value)


@cache
def _manager(folder: Path | None) -> Any:
    """Return lm-eval's index of tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(folder))
