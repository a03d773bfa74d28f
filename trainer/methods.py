"""The methods of the comparison (paper Table 1): each learns from one training state and becomes a recommender.

All learn from the same windows of the same high-quality sessions and choose among the same items. Methods that rank
items give their sessions by `trainer.rankings`; what goes on from OneRec goes on from one and the same checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import msgspec
import numpy as np

from onerec.config import Config
from trainer.config import PreferenceConfig, PreferenceLossName, RewardConfig, RewardModelConfig
from trainer.data import Example
from trainer.items import Catalogue
from trainer.judge import OneRecRecommender, Recommender
from trainer.reward_training import RewardTraining

if TYPE_CHECKING:
    from trainer.checkpoint import Checkpoint
    from trainer.rankings import ItemRanker
    from trainer.reward import RewardModel


class RankerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """SASRec, BERT4Rec and FDSA; see `trainer.baselines.fitting.RankerConfig`."""

    epochs: int = 60
    patience: int = 4
    length: int = 50
    learning_rate: float = 1e-3


class Alignment(msgspec.Struct, frozen=True, kw_only=True):
    """What follows the seed model, in every preference method alike: the newest `share` of the windows, `passes` times.

    `ratio`: r_DPO; `snapshots`: how many M_t a pass of IPA has; `weight`: λ; `beta`: of the losses that are DPO's form with
    its sum of log-ratios; the others have their own constants; `rejected`: losers of S-DPO.
    """

    share: float = 0.5
    passes: int = 1
    snapshots: int = 4
    ratio: float = 0.1
    weight: float = 1.0
    beta: float = 0.5
    rejected: int = 3
    min_margin: float = 1e-3
    learning_rate: float = 3e-4


class Reinforcement(msgspec.Struct, frozen=True, kw_only=True):
    """ECPO after the seed model: `steps` of `users` users with `group` sessions each."""

    steps: int = 60
    users: int = 8
    group: int = 16
    updates: int = 2
    learning_rate: float = 5e-4


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How every method is trained; the same for all seeds. `width`: sessions generated a case, and N of the pairs."""

    width: int = 32
    cases: int = 200
    passes: int = 3
    tiger_passes: int = 3
    learning_rate: float = 1e-3
    batch_windows: int = 32
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    preset: str = "tiny"
    ranker: RankerSettings = RankerSettings()
    reward_model: RewardModelConfig = RewardModelConfig()
    reward_training: RewardTraining = RewardTraining()
    reward: RewardConfig = RewardConfig()
    alignment: Alignment = Alignment()
    reinforcement: Reinforcement = Reinforcement()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a method learns from: the training state and, read from it once, catalogue and windows in log order.

    `folder` is the seed's own; `features` int [N, F] are categories of the items, -1 for none; `m` items a session.
    """

    folder: Path
    state: Path
    seed: int
    settings: Settings
    config: Config
    catalogue: Catalogue
    examples: list[Example]
    features: np.ndarray
    m: int
    say: Callable[[str], None] = lambda text: None

    @functools.cached_property
    def reward_model(self) -> RewardModel:
        """The seed's judge, which preference methods learn from too; it must have been trained."""
        return load_reward_model(self.folder)

    def checkpoint(self, run: str) -> Checkpoint:
        """The generator "onerec" or "tiger" as trained for this seed; it must have been."""
        from trainer.checkpoint import latest_checkpoint

        return latest_checkpoint(self.folder / run)


class Trained(NamedTuple):
    """A method that has learnt; `notes` are numbers worth keeping beside its line."""

    recommender: Recommender
    notes: dict[str, Any]


class Method(NamedTuple):
    """A row of the table; `needs`: the parts that it goes on from, whose seconds count as its own."""

    name: str
    group: str
    train: Callable[[Task], Trained]
    needs: tuple[str, ...] = ()


REWARD_FILE = "reward.safetensors"
REWARD_CONFIG = "reward-config.json"


def _reward_part(task: Task) -> dict[str, Any]:
    """Pre-train the judge of a seed and keep it in its folder."""
    from safetensors.torch import save_file

    from streaming.store import Reader
    from trainer.reward_training import fit_reward_model, judged_sessions

    catalogue = task.catalogue
    config = msgspec.structs.replace(
        task.settings.reward_model, levels=catalogue.levels, codes=catalogue.codes, session_items=task.m
    )
    with Reader(task.state) as reader:
        sessions = judged_sessions(reader, catalogue, config)
    training = msgspec.structs.replace(task.settings.reward_training, seed=task.seed)
    model, fit = fit_reward_model(
        sessions, catalogue.item_codes, config, training, centroids=catalogue.centroids,
        progress=lambda epoch, loss: task.say(f"reward model: epoch {epoch}, held-out loss {loss:.4f}"),
    )
    save_file(model.state_dict(), task.folder / REWARD_FILE)
    (task.folder / REWARD_CONFIG).write_bytes(msgspec.json.encode(config))
    found: dict[str, Any] = msgspec.to_builtins(fit)
    return found


def load_reward_model(folder: Path) -> RewardModel:
    """The judge of a seed's folder."""
    from safetensors.torch import load_file

    from trainer.reward import RewardModel

    model = RewardModel(msgspec.json.decode((folder / REWARD_CONFIG).read_bytes(), type=RewardModelConfig))
    model.load_state_dict(load_file(folder / REWARD_FILE))
    return model.eval()


def item_sequences(examples: Sequence[Example]) -> list[list[int]]:
    """One sequence a user in time order, from the windows in log order: H(t) of the first window, then all targets."""
    found: dict[str, list[int]] = {}
    for example in sorted(examples, key=lambda example: example.ts):
        user, targets = example.session_id.split(":", 1)[0], example.targets.tolist()
        sequence = found.setdefault(user, example.history.tolist())
        if not example.scored:
            # The last window of a session is completed backwards: its first items stand there already.
            overlap = next((k for k in range(len(targets), 0, -1) if sequence[-k:] == targets[:k]), 0)
            targets = targets[overlap:]
        sequence += targets
    return list(found.values())


def _ranking(ranker: ItemRanker, task: Task) -> Recommender:
    from trainer.rankings import RankingRecommender

    return RankingRecommender(ranker, task.m)


def _popularity(task: Task) -> Trained:
    from trainer.baselines import PopularityRanker

    ranker = PopularityRanker(len(task.catalogue.item_ids))
    ranker.fit([example.targets.tolist() for example in task.examples])
    return Trained(_ranking(ranker, task), {})


def _covisitation(task: Task) -> Trained:
    from trainer.baselines import CoVisitationRanker

    ranker = CoVisitationRanker(len(task.catalogue.item_ids))
    ranker.fit(item_sequences(task.examples))
    return Trained(_ranking(ranker, task), {})


def _transformer(task: Task, name: str) -> Trained:
    from trainer.baselines.bert4rec import BERT4Rec
    from trainer.baselines.fdsa import FDSA
    from trainer.baselines.fitting import RankerConfig, TransformerRanker
    from trainer.baselines.sasrec import SASRec

    given = task.settings.ranker
    config = RankerConfig(
        epochs=given.epochs, patience=given.patience, length=given.length, learning_rate=given.learning_rate,
        seed=task.seed,
    )
    items = len(task.catalogue.item_ids)
    makers: dict[str, Callable[[], TransformerRanker]] = {
        "sasrec-bce": lambda: SASRec(items, config, loss="bce"),
        "sasrec-ce": lambda: SASRec(items, config, loss="ce"),
        "bert4rec": lambda: BERT4Rec(items, config),
        "fdsa": lambda: FDSA(task.features, config),
    }
    ranker = makers[name]()
    fit = ranker.fit(
        item_sequences(task.examples),
        heard=lambda epoch: task.say(f"{name}: epoch {epoch.number}, held-out NDCG@10 {epoch.ndcg:.4f}"),
    )
    return Trained(_ranking(ranker, task), {"epochs": fit.epochs, "best_epoch": fit.best})


def _generator_part(task: Task, *, run: str) -> dict[str, Any]:
    """OneRec, or TIGER as the same with one item a session, trained by the trainer itself over the state's sessions."""
    import shutil

    from trainer.loop import train

    settings = task.settings
    passes, session_items = (settings.tiger_passes, 1) if run == "tiger" else (settings.passes, None)
    # One that was killed begins anew, so that the seconds are those of the whole.
    shutil.rmtree(task.folder / run, ignore_errors=True)
    config = msgspec.structs.replace(
        task.config,
        train=msgspec.structs.replace(
            task.config.train, preset=settings.preset, learning_rate=settings.learning_rate, session_items=session_items,
            batch_windows=settings.batch_windows * (task.m if run == "tiger" else 1), precision=settings.precision,
            backlog_passes=passes, score_share=0.0, checkpoint_seconds=1e9, checkpoint_sessions=10**9,
            keep_checkpoints=1, threads=1, seed=task.seed,
        ),
        reward=msgspec.structs.replace(task.config.reward, train=False),
    )
    seen = {"round": -1}

    def progress(progress: Any) -> None:
        if progress.line.round != seen["round"]:
            seen["round"] = progress.line.round
            task.say(f"{run}: pass {progress.line.round + 1} of {passes}, loss {progress.line.loss}")

    result = train(task.state, task.folder / run, config, progress=progress)
    return {"passes": passes, "steps": result.steps}


def _onerec(task: Task) -> Trained:
    from trainer.checkpoint import load_model

    return Trained(OneRecRecommender(load_model(task.checkpoint("onerec")), task.catalogue.item_codes), {})


def _tiger(task: Task) -> Trained:
    from trainer.baselines.tiger import BeamRanker
    from trainer.checkpoint import load_model

    model = load_model(task.checkpoint("tiger"))
    ranker = BeamRanker(model, task.catalogue.item_codes, width=max(64, 2 * task.settings.width))
    return Trained(TigerRecommender(ranker, task), {})


class TigerRecommender:
    """TIGER's next items by beam search; its sessions are the likeliest sets of these. Legality is of single items."""

    def __init__(self, ranker: Any, task: Task) -> None:
        self._sessions = _ranking(ranker, task)
        self._free = OneRecRecommender(ranker.model, task.catalogue.item_codes)

    def items(self, cases: Sequence[Any], k: int) -> list[np.ndarray]:
        """See `trainer.judge.Recommender`."""
        return self._sessions.items(cases, k)

    def sessions(self, cases: Sequence[Any], count: int) -> list[np.ndarray]:
        """See `trainer.judge.Recommender`."""
        return self._sessions.sessions(cases, count)

    def legality(self, cases: Sequence[Any], count: int) -> float:
        """Share of the items written without the trie that are real."""
        return self._free.legality(cases, count)


def _newest(task: Task) -> list[Example]:
    """The newest windows, of whole sessions: what alignment goes on with."""
    begin = int(len(task.examples) * (1 - task.settings.alignment.share))
    while 0 < begin < len(task.examples) and task.examples[begin].session_id == task.examples[begin - 1].session_id:
        begin -= 1
    return task.examples[begin:]


def _aligned(
    task: Task, *, loss: PreferenceLossName, source: Literal["self", "logged"], weight: float | None = None
) -> Trained:
    """OneRec, its seed model trained on with preference pairs; `weight` 0: as many steps more without any."""
    from trainer.checkpoint import load_model, load_optimizer
    from trainer.inline import AlignConfig, align

    settings, checkpoint = task.settings.alignment, task.checkpoint("onerec")
    model = load_model(checkpoint)
    preference = PreferenceConfig(
        ratio=settings.ratio if weight != 0 else 0.0,
        responses=task.settings.width,
        loss=loss,
        weight=settings.weight if weight is None else weight,
        rejected=settings.rejected if loss == "s-dpo" else 1,
        beta=settings.beta if loss in OF_DPO_FORM else None,
        min_margin=settings.min_margin,
    )
    done = align(
        model, _newest(task), task.catalogue.item_codes, task.reward_model, settings=preference,
        reward=task.settings.reward,
        config=AlignConfig(
            source=source, snapshots=settings.snapshots if source == "self" else 0, passes=settings.passes,
            batch_windows=task.settings.batch_windows, learning_rate=settings.learning_rate,
            precision=task.settings.precision, seed=task.seed,
        ),
        optimizer=load_optimizer(checkpoint)["optimizer"],
    )
    notes = msgspec.to_builtins(done)
    del notes["lines"]
    return Trained(OneRecRecommender(model, task.catalogue.item_codes), notes)


def _ecpo(task: Task) -> Trained:
    """OneRec, its seed model reinforced."""
    import torch

    from exporter.trie import build_trie
    from trainer.checkpoint import load_model, load_optimizer
    from trainer.ecpo import EcpoConfig, reinforce
    from trainer.optim import Optimizer
    from trainer.policy_rewards import PolicyRewards

    given, codes, checkpoint = task.settings.reinforcement, task.catalogue.item_codes, task.checkpoint("onerec")
    model = load_model(checkpoint)
    rewards = PolicyRewards(build_trie(codes, model.config.codes), task.reward_model, task.settings.reward)
    config = EcpoConfig(
        users=given.users, group=given.group, updates=given.updates, learning_rate=given.learning_rate
    )
    optimizer = Optimizer(
        model, learning_rate=config.learning_rate, clip_norm=config.clip_norm, precision=config.precision
    )
    # A fresh Adam begins with steps of the sign's size, which would throw the policy far off.
    optimizer.load_state_dict(load_optimizer(checkpoint)["optimizer"])
    steps = list(
        reinforce(
            model, _newest(task), codes, rewards, config, generator=torch.Generator().manual_seed(task.seed),
            steps=given.steps, optimizer=optimizer,
        )
    )
    notes = {"steps": len(steps), "first_reward": steps[0].reward, "last_reward": steps[-1].reward}
    return Trained(OneRecRecommender(model, codes), notes)


COUNTS, DISCRIMINATIVE, GENERATIVE = "Counts", "Pointwise discriminative", "Pointwise generative"
LISTWISE, PREFERENCE, REINFORCED = "Listwise generative", "Listwise, preference alignment", "Listwise, reinforcement"
LOSS_NAMES: dict[PreferenceLossName, str] = {
    "dpo": "DPO", "ipo": "IPO", "cdpo": "cDPO", "rdpo": "rDPO", "cpo": "CPO", "simpo": "SimPO", "s-dpo": "S-DPO",
}
OF_DPO_FORM = frozenset({"dpo", "cdpo", "rdpo", "s-dpo"})
AFTER_SEED = ("onerec-model", "reward-model")

PARTS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "onerec-model": functools.partial(_generator_part, run="onerec"),
    "reward-model": _reward_part,
    "tiger-model": functools.partial(_generator_part, run="tiger"),
}
"""What is trained once a seed and kept in its folder; each says how it went."""


def _methods() -> dict[str, Method]:
    found = {
        "popularity": Method("Popularity", COUNTS, _popularity),
        "covisitation": Method("Co-visitation", COUNTS, _covisitation),
    }
    for key, name in (("sasrec-bce", "SASRec (BCE)"), ("sasrec-ce", "SASRec (CE)"), ("bert4rec", "BERT4Rec"), ("fdsa", "FDSA")):
        found[key] = Method(name, DISCRIMINATIVE, functools.partial(_transformer, name=key))
    found["tiger"] = Method("TIGER", GENERATIVE, _tiger, ("tiger-model",))
    found["onerec"] = Method("OneRec", LISTWISE, _onerec, ("onerec-model",))
    more = functools.partial(_aligned, loss="dpo", source="self", weight=0.0)
    found["onerec+ntp"] = Method("OneRec, trained on", LISTWISE, more, AFTER_SEED)
    for loss in get_args(PreferenceLossName):
        variant = functools.partial(_aligned, loss=loss, source="logged")
        found[f"onerec+{loss}"] = Method(f"OneRec+{LOSS_NAMES[loss]}", PREFERENCE, variant, AFTER_SEED)
    ipa = functools.partial(_aligned, loss="dpo", source="self")
    found["onerec+ipa"] = Method("OneRec+IPA", PREFERENCE, ipa, AFTER_SEED)
    found["onerec+ecpo"] = Method("OneRec+ECPO", REINFORCED, _ecpo, AFTER_SEED)
    return found


METHODS: dict[str, Method] = _methods()
"""Every method by the name that `--methods` takes, in the order of the table."""
