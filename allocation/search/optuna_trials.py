"""Trials in an Optuna storage: open it, run trials, and fail those of dead workers.

Optuna's heartbeats work only in databases and under its own loop, so every trial records its worker
instead: a trial left running by a dead process of this machine is marked as failed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitknap.allocation.search.trial_database import check_database
from bitknap.allocation.search.trial_journal import open_journal
from bitknap.errors import BitknapError, InputError
from bitknap.names import check_name

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

SAMPLERS = ("tpe", "cmaes", "nsga2")
# Keys of a trial's attributes.
PLAN, REASON, WORKER = "plan", "reason", "worker"
_JOURNALS = (".log", ".journal")
_EXAMPLES = "sqlite:///study.db, journal:study.log, postgresql://user@host/name"
# How long workers on one SQLite file wait for each other, in seconds.
_PATIENCE = 60
# NSGA-II's population: Optuna's 50 would spend a study of 100 trials on two generations.
_POPULATION = 20


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence Optuna's logging and its warnings about experimental options inside the block."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def shown(url: str) -> str:
    """Return a storage URL without its password, safe for messages and pages."""
    if "://" not in url:
        return url
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url.partition("://")[0] + "://…"


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turn a storage's errors into one-line errors.

    Raises:
        InputError: the storage cannot be reached or read, or its driver is missing.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    where = f"storage {shown(url)}"
    try:
        yield
    except ArgumentError as error:
        raise InputError(f"{where}: {first_line(error)}; write one like {_EXAMPLES}") from None
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = getattr(error, "orig", None) or error.__cause__ or error
        raise InputError(
            f"{where}: cannot be reached ({first_line(cause)}); check that it is running and "
            "writable"
        ) from None


@contextlib.contextmanager
def understanding(url: str) -> Iterator[None]:
    """Turn any failure of Optuna on damaged or foreign data into a one-line error.

    Raises:
        InputError: a study or a trial in the storage cannot be read.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (BitknapError, SQLAlchemyError, StorageInternalError, MemoryError):
        raise
    except Exception as error:
        # Optuna builds studies and trials from rows without checking them.
        raise InputError(
            f"storage {shown(url)}: a study in it is damaged ({first_line(error)[:100]}); "
            "choose another storage"
        ) from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def open_storage(url: str, *, create: bool = False) -> BaseStorage:
    """Return the storage behind a URL.

    Args:
        url: any URL that Optuna accepts, "journal:PATH", or a path that ends in .log or .journal.
        create: whether to create a missing file.

    Raises:
        InputError: the storage cannot be reached or read, its driver or its file is missing.
    """
    if url.startswith("journal:") or ("://" not in url and url.endswith(_JOURNALS)):
        path = Path(url.removeprefix("journal:"))
        _check_there(url, path, create=create)
        return open_journal(url, path)
    from optuna.storages import RDBStorage
    from sqlalchemy.engine import make_url
    from sqlalchemy.pool import NullPool

    with reaching(url):
        address = make_url(url)
        options: dict[str, Any] = {"pool_pre_ping": True}
        if address.get_backend_name() == "sqlite":
            path = Path(address.database or "")
            _check_there(url, path, create=create)
            check_database(f"storage {shown(url)}", path, create=create)
            options = {"connect_args": {"timeout": _PATIENCE}, "poolclass": NullPool}
        try:
            return RDBStorage(url, engine_kwargs=options)
        except ImportError as error:
            driver = getattr(error.__cause__, "name", None) or address.drivername
            raise InputError(
                f"storage {shown(url)}: its driver {driver} is not installed; pip install {driver}"
            ) from None
        except RuntimeError as error:
            raise InputError(
                f"storage {shown(url)}: written by another version of Optuna "
                f"({first_line(error)}); run 'optuna storage upgrade'"
            ) from None


def file_of(url: str) -> Path | None:
    """Return the file of a storage; None if it is not a file or the URL is unknown."""
    if url.startswith("journal:") or ("://" not in url and url.endswith(_JOURNALS)):
        return Path(url.removeprefix("journal:"))
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    with contextlib.suppress(ArgumentError):
        address = make_url(url)
        if address.get_backend_name() == "sqlite" and address.database:
            return Path(address.database)
    return None


def _check_there(url: str, path: Path, *, create: bool) -> None:
    if not create and not path.is_file():
        raise InputError(f"storage {shown(url)}: no such file; create a study in it first")


def make_sampler(name: str, seed: int) -> BaseSampler:
    """Return a sampler whose draws in trial n depend only on the seed and n.

    So two workers never repeat each other's draws, and a resumed worker continues as an
    uninterrupted one would.

    Raises:
        InputError: the name is unknown.
    """
    check_name("sampler", name, SAMPLERS)
    from optuna.samplers import BaseSampler

    class Seeded(BaseSampler):
        """The named sampler, created anew for every trial; its state is in the storage."""

        def __init__(self) -> None:
            self._inner = _plain_sampler(name, seed)

        def before_trial(self, study: Any, trial: Any) -> None:
            drawn = np.random.SeedSequence([seed, trial.number]).generate_state(1)
            self._inner = _plain_sampler(name, int(drawn[0]))
            self._inner.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return self._inner.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return self._inner.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, name: str, where: Any) -> Any:
            return self._inner.sample_independent(study, trial, name, where)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            self._inner.after_trial(study, trial, state, values)

    return Seeded()


def _plain_sampler(name: str, seed: int) -> BaseSampler:
    from optuna.samplers import CmaEsSampler, NSGAIISampler, TPESampler

    if name == "nsga2":
        return NSGAIISampler(population_size=_POPULATION, seed=seed)
    # Running trials count as bad ones, so that workers keep away from each other.
    tpe = TPESampler(multivariate=name == "tpe", constant_liar=True, seed=seed)
    if name == "tpe":
        return tpe
    # CMA-ES knows no switches.
    return CmaEsSampler(seed=seed, independent_sampler=tpe, warn_independent_sampling=False)


def known_values(study: optuna.Study) -> dict[str, list[float]]:
    """Return the values already measured, by the digest of the plan."""
    from optuna.trial import TrialState

    return {
        trial.user_attrs[PLAN]: list(trial.values)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if PLAN in trial.user_attrs
    }


def worker() -> str:
    """Return an identifier of this process: machine, process namespace and process."""
    namespace = Path("/proc/self/ns/pid")
    inner = namespace.stat().st_ino if namespace.exists() else 0
    return f"{platform.node()}/{inner}:{os.getpid()}"


def fail_abandoned(study: optuna.Study) -> int:
    """Mark trials left running by dead processes of this machine as failed; return how many.

    Their enqueued parameters are enqueued again.
    """
    from optuna.trial import TrialState

    count = 0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not _died(str(trial.user_attrs.get(WORKER, ""))):
            continue
        with contextlib.suppress(ValueError, RuntimeError):
            # Another worker may have ended the trial in between.
            study.tell(trial.number, state=TrialState.FAIL)
            count += 1
            if "fixed_params" in trial.system_attrs:
                study.enqueue_trial(dict(trial.system_attrs["fixed_params"]))
    return count


def _died(name: str) -> bool:
    here, _, number = name.rpartition(":")
    if os.name != "posix" or not number.isdigit() or here != worker().rpartition(":")[0]:
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
