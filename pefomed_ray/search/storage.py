"""The study in Optuna's storage: what was drawn for each trial, what it reported, and how it ended.

It is what a search goes on from, with the trials' own folders; what Tune writes down is not asked. A row is committed
before its trial starts and again with each report, so a killed driver leaves rows RUNNING: those trials go on.

    COMPLETE  ran to its end; the value is its best epoch's
    PRUNED    stopped by the scheduler; holds what it reported until then, and no value of its own
    FAIL      with the user attribute `reason`
    WAITING   a known point that is still to be tried

TPE ranks PRUNED trials behind COMPLETE ones, the further they came the better, and leaves FAIL out. As COMPLETE (so Ray
records them) their early values would stand beside values of trials that learnt for ten times as long.
"""

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from pefomed_ray.artifacts.storage import digest_of
from pefomed_ray.config import SearchConfig
from pefomed_ray.config.schema import Choice, Dimension, Integer, LogUniform
from pefomed_ray.errors import ConfigError
from pefomed_ray.search.space import drawn_name, drawn_of, output_dir

STUDY_FILE = "study.db"
REASON = "reason"
"""User attribute of a FAIL trial."""
OUTPUT = "output_dir"
"""User attribute of the study: the search it is of; a shared database holds many."""
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

optuna.logging.set_verbosity(optuna.logging.WARNING)


def check_storage(search: SearchConfig, *, resume: bool = False) -> None:
    """Raise ConfigError where `storage` cannot be opened, or holds this study for another search; without Ray."""
    if search.storage is not None:
        storage = _open_storage(search)
        if search.name in optuna.get_all_study_names(storage):
            if not resume:
                raise ConfigError(_taken(search))
            _check_owner(search, optuna.load_study(study_name=search.name, storage=storage))


def open_study(search: SearchConfig, *, resume: bool) -> Study:
    """The search's study, made if it is new, with those known points waiting in it that it has not seen.

    Raises ConfigError as `check_storage` does.
    """
    try:
        study = optuna.create_study(
            storage=_open_storage(search),
            study_name=search.name,
            direction="maximize",
            pruner=optuna.pruners.NopPruner(),  # trials are stopped by Tune's scheduler
            load_if_exists=resume,
        )
    except optuna.exceptions.DuplicatedStudyError:
        raise ConfigError(_taken(search)) from None
    _check_owner(search, study)
    study.set_user_attr(OUTPUT, str(output_dir(search)))
    for point in search.points:
        study.enqueue_trial(drawn_of(search, point), skip_if_exists=True)
    return study


def distributions(search: SearchConfig) -> dict[str, BaseDistribution]:
    """What is drawn for a trial."""
    return {drawn_name(key, dimension): _distribution(dimension) for key, dimension in search.space.items()}


def sampler(search: SearchConfig, number: int) -> TPESampler:
    """What draws trial `number`: seeded for it alone, so that a search which goes on draws what an unbroken one would.

    Nothing random is stored; TPE looks at nothing but its seed and the study.
    """
    return TPESampler(
        seed=int(digest_of([search.seed, number])[:8], 16),
        n_startup_trials=search.sampler.n_startup_trials,
        multivariate=search.sampler.multivariate,
        constant_liar=search.sampler.constant_liar,
    )


def is_on_plateau(search: SearchConfig, trials: list[FrozenTrial]) -> bool:
    """Whether the newest `plateau_trials` that ended and did not fail are all no better than one before them."""
    if search.plateau_trials is None:
        return False
    values = [
        max(trial.intermediate_values.values())
        for trial in trials
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and trial.intermediate_values
    ]
    earlier, newest = values[: -search.plateau_trials], values[-search.plateau_trials :]
    return bool(earlier) and max(newest) <= max(earlier)


def _open_storage(search: SearchConfig) -> RDBStorage:
    try:
        if search.storage is None:
            return RDBStorage(f"sqlite:///{output_dir(search) / STUDY_FILE}")
        # Servers close connections that were idle for as long as an epoch may take.
        return RDBStorage(search.storage, engine_kwargs={"pool_pre_ping": True})
    except (ImportError, ValueError, SQLAlchemyError) as error:
        raise ConfigError(_cannot_open(search, error)) from None


def _cannot_open(search: SearchConfig, error: Exception) -> str:
    """Without what the error quotes: the URL, and statements."""
    if search.storage is None:
        return f"{str(output_dir(search) / STUDY_FILE)!r} is not a whole SQLite file; begin anew in another output_dir"
    if "psycopg" in str(error) and isinstance(error, ImportError):
        return "storage: PostgreSQL needs a driver; `pip install 'pefomed-ray[postgres]'`"
    if isinstance(error, DBAPIError):
        return f"storage: {str(error.orig).splitlines()[0]}"
    return "storage: not the URL of a database that can be opened here, such as postgresql://user@host/optuna"


def _check_owner(search: SearchConfig, study: Study) -> None:
    owner, output = study.user_attrs.get(OUTPUT), str(output_dir(search))
    if search.storage is not None and owner not in (None, output):
        raise ConfigError(
            f"the study {search.name!r} in the storage is that of the search in {owner!r}, not of the one in "
            f"{output!r}; give this search another name"
        )


def _taken(search: SearchConfig) -> str:
    return (
        f"the storage holds a study {search.name!r} already; give this search another name, or go on with that one by "
        "--resume and its output_dir"
    )


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.choice)
    if isinstance(dimension, Integer):
        return IntDistribution(*dimension.int)
    if isinstance(dimension, LogUniform):
        return FloatDistribution(*dimension.loguniform, log=True)
    return FloatDistribution(*dimension.uniform)


def reported(trial: FrozenTrial) -> dict[int, float]:
    """What a trial reported, by epoch from 1."""
    return dict(sorted(trial.intermediate_values.items()))


def trial_name(number: int) -> str:
    """What a trial is called, in its folder's name too, by its number in the study."""
    return f"{number:04d}"


def unfinished(study: Study) -> list[FrozenTrial]:
    """Trials that began and have not ended: where this process runs none, those of one that was killed."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def remaining(search: SearchConfig, study: Study) -> int:
    """How many trials are still to run, unfinished ones included."""
    ended = len(study.get_trials(deepcopy=False, states=ENDED))
    return max(search.trials - ended, len(unfinished(study)))
