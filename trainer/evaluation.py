"""Any state, any run: its newest checkpoint beside popularity and co-visitation, on sessions that it has not learnt."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from onerec.errors import UserError
from streaming.store import Reader
from streaming.windows import windows
from trainer.baselines import CoVisitationRanker, PopularityRanker
from trainer.checkpoint import Checkpoint, latest_checkpoint, load_model, load_reward_model
from trainer.data import known_rows
from trainer.items import Catalogue, load_catalogue, refresh_catalogue
from trainer.judge import Case, Judgement, OneRecRecommender, Recommender, judge, modelled_rewards, true_rewards
from trainer.rankings import RankingRecommender
from trainer.runs import read_run
from trainer.table_data import item_facts

if TYPE_CHECKING:
    from simulator.world import World


class Judged(NamedTuple):
    """A recommender and what it is worth; `seconds` of judging."""

    name: str
    judgement: Judgement
    seconds: float


class Evaluation(NamedTuple):
    """The table; `learnt`: the cases are sessions that the checkpoint has learnt, since there are no others."""

    checkpoint: Checkpoint
    learnt: bool
    judged: list[Judged]


def evaluate_run(
    state_dir: Path,
    run_dir: Path,
    *,
    cases: int = 200,
    width: int = 32,
    world: World | None = None,
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> Evaluation:
    """Judge a run's newest checkpoint on the first windows of the newest `cases` high-quality sessions behind its cursor.

    The baselines learn exactly the sessions up to the cursor. Rewards are those of the checkpoint's own reward model, and
    of `world` where the log is of one. Raises UserError where there is no checkpoint, no case, or another codebook.
    """
    checkpoint = latest_checkpoint(run_dir)
    with Reader(state_dir) as reader:
        catalogue = refresh_catalogue(state_dir, reader, load_catalogue(state_dir))
        _check_codebook(checkpoint, catalogue, state_dir, run_dir)
        cursor = _learnt_up_to(checkpoint, run_dir)
        found, learnt = _cases(reader, catalogue, cursor, cases, state_dir)
        recommenders = _baselines(reader, catalogue, cursor, checkpoint.session_items)
        facts = item_facts(reader, catalogue)
    recommenders["onerec"] = OneRecRecommender(load_model(checkpoint), catalogue.item_codes)
    reward_model, reward = load_reward_model(checkpoint), None
    if reward_model is not None:
        reward = modelled_rewards(
            reward_model, catalogue.item_codes, history_length=reward_model.config.history_length
        )
    truth = None if world is None else true_rewards(world, catalogue.item_ids)
    judged = []
    for name, recommender in recommenders.items():
        began = time.perf_counter()
        told = judge(
            recommender, found, facts, width=width, reward=reward, truth=truth,
            progress=lambda done, name=name: progress(name, done),  # type: ignore[misc]
        )
        judged.append(Judged(name, told, time.perf_counter() - began))
    return Evaluation(checkpoint, learnt, judged)


def _check_codebook(checkpoint: Checkpoint, catalogue: Catalogue, state_dir: Path, run_dir: Path) -> None:
    if checkpoint.codebook_version != catalogue.version:
        raise UserError(
            f"generator and reward model of {run_dir} have learnt the semantic IDs of codebook "
            f"{checkpoint.codebook_version}, the state {state_dir} now has {catalogue.version}: their codes mean other items; "
            "give the state that the run was trained on, or train a new --run"
        )


def _learnt_up_to(checkpoint: Checkpoint, run_dir: Path) -> int:
    """The last sequence of the log that the checkpoint has learnt; later passes over a backlog begin before it."""
    run = read_run(run_dir)
    backlog = run.backlog if run is not None and checkpoint.cursor.round > 0 else 0
    return max(checkpoint.cursor.sequence, backlog)


def _cases(
    reader: Reader, catalogue: Catalogue, cursor: int, count: int, state_dir: Path
) -> tuple[list[Case], bool]:
    """The newest `count` cases behind the cursor; where there is none the newest of all, and True."""
    semantics = reader.semantics()
    m, n = semantics.session.target_items, semantics.history.length
    fresh: deque[Case] = deque(maxlen=count)
    known: deque[Case] = deque(maxlen=count)
    for sequence, session in reader.sessions():
        if not session.high_quality:
            continue
        window = windows(session, m, n)[0]
        targets = known_rows(window.items, catalogue.index, len(catalogue.index))
        if len(targets):
            history = known_rows(window.history, catalogue.index, len(catalogue.index))
            (fresh if sequence > cursor else known).append(Case(session.user_id, window.ts, history, targets))
    if not fresh and not known:
        raise UserError(f"state {state_dir} has no high-quality session with a known item to test with; replay more events")
    return list(fresh or known), not fresh


def _baselines(reader: Reader, catalogue: Catalogue, cursor: int, m: int) -> dict[str, Recommender]:
    """Popularity and co-visitation of the windows of the sessions up to the cursor."""
    items = len(catalogue.item_ids)
    popularity, covisitation = PopularityRanker(items), CoVisitationRanker(items)
    learnt = []
    for sequence, session in reader.sessions():
        if sequence > cursor:
            break
        if session.high_quality:
            watched = [item.item_id for item in session.items]
            learnt.append(known_rows(watched, catalogue.index, items).tolist())
    popularity.fit(learnt)
    covisitation.fit(learnt)
    return {"popularity": RankingRecommender(popularity, m), "covisitation": RankingRecommender(covisitation, m)}
