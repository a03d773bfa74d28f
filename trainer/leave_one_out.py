"""The leave-one-out table of an imported file: every method trained alike, the last item of each user ranked.

Rules. Full ranking: the test item among all items of the file, nothing sampled, nothing filtered out (an item that the
user has had may be ranked). The history holds the validation item. Methods that score items rank equals by their row, the
order of the item ids. TIGER and OneRec rank semantic IDs by beam search; the items that share one stand together in the
order of their rows, and an item whose ID no beam reached has no rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from onerec.errors import UserError
from trainer.baselines import CoVisitationRanker, PopularityRanker
from trainer.baselines.bert4rec import BERT4Rec
from trainer.baselines.fdsa import FDSA
from trainer.baselines.fitting import Epoch, RankerConfig, TransformerRanker, ranks
from trainer.baselines.sasrec import SASRec
from trainer.baselines.tiger import BeamRanker, SequenceTraining, fit_sequences
from trainer.presets import preset
from trainer.rankings import ItemRanker
from trainer.sequences import Dataset

METHODS = {
    "popularity": "Popularity",
    "co-visitation": "Co-visitation",
    "sasrec-bce": "SASRec (BCE)",
    "sasrec-ce": "SASRec (CE)",
    "bert4rec": "BERT4Rec",
    "fdsa": "FDSA",
    "tiger": "TIGER (m = 1)",
    "onerec": "OneRec (m = 5)",
}
"""Methods in the order of the table, with their names in it."""
SESSION_ITEMS = 5
BEAMS = 40
"""Four times what is looked at, so that a search for ten items is not a narrow one."""
BLOCK = 256


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds that all methods share: newest items of a history, and epochs (early stopping ends sooner)."""

    preset: str = "tiny"
    length: int = 50
    epochs: int | None = None


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """One method and seed: means over the tested `users`; `epochs` run and `best` kept, None for counts; wall seconds."""

    method: str
    seed: int
    users: int
    hr5: float = msgspec.field(name="hr@5")
    hr10: float = msgspec.field(name="hr@10")
    ndcg5: float = msgspec.field(name="ndcg@5")
    ndcg10: float = msgspec.field(name="ndcg@10")
    epochs: int | None
    best: int | None
    seconds: float


Heard = Callable[[Epoch], None]


def check_methods(names: list[str]) -> None:
    """Raise UserError for a name that is no method, naming those there are."""
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods {name}: no such method; choose of {', '.join(METHODS)}")


def measure(
    dataset: Dataset, method: str, seed: int, settings: Settings, heard: Heard = lambda epoch: None
) -> Score:
    """Train `method` with `seed` on the training part, stop early by the validation items, and rank the test items."""
    began = time.monotonic()
    ranker, fitted = _fitted(dataset, method, seed, settings, heard)
    test = dataset.test()
    parts = range(0, len(test.targets), BLOCK)
    places = np.concatenate(
        [ranks(ranker.log_probs(test.histories[i : i + BLOCK]), test.targets[i : i + BLOCK]) for i in parts]
    )
    return Score(
        method=method, seed=seed, users=len(places), seconds=time.monotonic() - began,
        epochs=fitted[0] if fitted else None, best=fitted[1] if fitted else None, **scores(places),
    )


def scores(places: NDArray[np.floating]) -> dict[str, Any]:
    """HR and NDCG at 5 and 10 of the places [U] of the only relevant item, by the fields of `Score`."""
    found = {}
    for k in (5, 10):
        within = places <= k
        found[f"hr{k}"] = float(within.mean())
        found[f"ndcg{k}"] = float(np.where(within, 1.0 / np.log2(1.0 + places), 0.0).mean())
    return found


def features_of(dataset: Dataset) -> NDArray[np.int32]:
    """What FDSA reads of an item, int32 [N, 1 + F]: its code of level 1, and the features given with the file."""
    return np.concatenate((dataset.item_codes[:, :1], dataset.features), axis=1)


def _fitted(
    dataset: Dataset, method: str, seed: int, settings: Settings, heard: Heard
) -> tuple[ItemRanker, tuple[int, int] | None]:
    """The trained method, and how many epochs it ran and which it kept."""
    items, training, held = len(dataset.items), dataset.training(), dataset.validation()
    if method in ("popularity", "co-visitation"):
        counter = PopularityRanker(items) if method == "popularity" else CoVisitationRanker(items)
        counter.fit(training)
        return counter, None
    if method in ("tiger", "onerec"):
        bound = {} if settings.epochs is None else {"epochs": settings.epochs}
        model = preset(
            settings.preset, levels=dataset.item_codes.shape[1], codes=dataset.codes, history_length=settings.length,
            session_items=1 if method == "tiger" else SESSION_ITEMS,
        )
        trained, fit = fit_sequences(
            model, dataset.item_codes, training, SequenceTraining(seed=seed, **bound), held=held, heard=heard
        )
        return BeamRanker(trained, dataset.item_codes, width=BEAMS), (fit.epochs, fit.best)
    bound = {} if settings.epochs is None else {"epochs": settings.epochs}
    config = RankerConfig(length=settings.length, seed=seed, **bound)
    transformer: TransformerRanker
    if method == "bert4rec":
        transformer = BERT4Rec(items, config)
    elif method == "fdsa":
        transformer = FDSA(features_of(dataset), config)
    else:
        transformer = SASRec(items, config, loss="bce" if method == "sasrec-bce" else "ce")
    fit = transformer.fit(training, held, heard)
    return transformer, (fit.epochs, fit.best)
