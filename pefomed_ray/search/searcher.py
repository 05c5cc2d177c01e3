"""Optuna's study as Ray Tune asks it for trials and tells it what becomes of them."""

from pathlib import Path
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import TrialState
from ray.tune.result import TRAINING_ITERATION
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from pefomed_ray.config import SearchConfig
from pefomed_ray.search.leaderboard import TRIALS_FOLDER
from pefomed_ray.search.space import output_dir, params_of
from pefomed_ray.search.storage import (
    REASON,
    distributions,
    is_on_plateau,
    reported,
    sampler,
    trial_name,
    unfinished,
)
from pefomed_ray.search.trial import Suggestion, failure

LOST = (
    "its process was lost more often than resources.max_failures allows: killed, by the system where memory ran out "
    "most often, or with its node"
)


class StudySearch(OptunaSearch):
    """Gives out the trials that a killed driver left first, under their own names; then the known points; then draws.

    What differs from Ray's own: a trial that ran to its end counts with its best epoch, one that the scheduler stopped
    is PRUNED, one that failed says why; and it keeps no snapshot of itself, since the study is where it goes on from.
    """

    def __init__(self, search: SearchConfig, study: Study) -> None:
        super().__init__(
            space=distributions(search),
            metric=search.metric,
            mode="max",
            sampler=sampler(search, 0),
            study_name=study.study_name,
            storage=study._storage,
        )
        self._search = search
        self._output = output_dir(search)
        self._left = unfinished(study)
        self._reported: dict[str, dict[int, float]] = {}

    def suggest(self, trial_id: str) -> Any:
        """A `Suggestion`; FINISHED on a plateau."""
        study = self._ot_study
        seen = study.get_trials(deepcopy=False)
        if self._left:
            row = self._left.pop(0)
            study.sampler = sampler(self._search, row.number)
            self._ot_trials[trial_id] = trial = optuna.Trial(study, row._trial_id)
            for name, distribution in self._space.items():
                trial._suggest(name, distribution)  # what was drawn, or is missing where the driver was killed drawing
            self._reported[trial_id] = reported(row)
        elif is_on_plateau(self._search, seen):
            return Searcher.FINISHED
        else:
            study.sampler = sampler(self._search, sum(row.state != TrialState.WAITING for row in seen))
            super().suggest(trial_id)
            self._reported[trial_id] = {}
        trial = self._ot_trials[trial_id]
        return Suggestion(trial=trial_name(trial.number), params=params_of(self._search, trial.params))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A report; what a trial that went on reports again is known."""
        if self.metric not in result:
            return  # a trial that failed in its first epoch
        epoch = result[TRAINING_ITERATION]
        if epoch not in self._reported[trial_id]:
            self._reported[trial_id][epoch] = result[self.metric]
            self._ot_trials[trial_id].report(result[self.metric], epoch)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The end of a trial, however it came."""
        trial, values = self._ot_trials[trial_id], self._reported[trial_id]
        reason = failure(self._folder(trial)) or (LOST if error else None)
        if reason:
            trial.set_user_attr(REASON, reason)
            self._ot_study.tell(trial, state=TrialState.FAIL)
        elif (
            result and result.get(TRAINING_ITERATION) not in values
        ):  # Tune tells every report but one that stops a trial
            self.on_trial_result(trial_id, result)
            self._ot_study.tell(trial, state=TrialState.PRUNED)
        elif values:
            self._ot_study.tell(trial, max(values.values()))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see the class."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, for Tune's snapshot of its own arguments: the storage's URL may hold a password."""
        return {}

    def _folder(self, trial: optuna.Trial) -> Path:
        return self._output / TRIALS_FOLDER / trial_name(trial.number)
