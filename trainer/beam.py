"""Fixed-step beam search for whole sessions, constrained by the catalogue's trie (paper §3.2; beam 128 in §4).

One implementation: `beam_search` runs it in torch, `exporter.onnx_graph` traces `first_item` and `next_item`. Hence no
control flow on data, and no shapes but those of the inputs.

Shapes: B users, W beams, W0 beams before a step (1 at the very first, then W), L levels, K codes a level,
C candidates a beam (K at level 0, then the widest node's children), m items, i items written, P cached positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from exporter.trie import Trie
from trainer.model import KeyValue, OneRec

SENTINEL = -6e4
"""Score of a dead beam: below any session's log-probability, and within fp16."""

TrieTensors = Mapping[str, Tensor]


class Beams(NamedTuple):
    """Sessions by falling score, equals by the lower beam; dead beams come last, with leaves -1 and score SENTINEL."""

    leaves: Tensor  # int64 [B, W, m]
    scores: Tensor  # fp32 [B, W], log P of the session's codes

    @property
    def alive(self) -> Tensor:
        """bool [B, W]: which beams hold a legal session."""
        return self.scores > SENTINEL


class FreeBeams(NamedTuple):
    """What the search writes without a trie: codes that may name no item."""

    codes: Tensor  # int64 [B, W, m, L]
    scores: Tensor  # fp32 [B, W]


class Memory(NamedTuple):
    """The encoded history, made once a request and shared by all beams."""

    cross_kv: list[KeyValue]
    mask: Tensor  # bool [B, S]


class State(NamedTuple):
    """The search between two items."""

    scores: Tensor  # fp32 [B, W]
    written: Tensor  # int64 [B, W, i]: leaves; without a trie codes, [B, W, i·L]
    last: Tensor  # int64 [B, W]: the last item's code of the last level, not yet read by the decoder
    cache: list[KeyValue]  # a decoder layer's [B·W, H, P, dh], P = i (L + 1) - 1


def trie_tensors(trie: Trie, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The trie's arrays as tensors, int32."""
    return {name: torch.from_numpy(array).to(device) for name, array in trie.arrays().items()}


@torch.no_grad()
def beam_search(
    model: OneRec, trie: TrieTensors, history: Tensor, history_mask: Tensor, *, width: int, items: int | None = None
) -> Beams:
    """The `width` best sessions that a beam search finds: only items of the catalogue, none twice within a session.

    history int64 [B, T, L], right-padded, and history_mask bool [B, T]; items: m, the model's own by default. The score
    is the sum of log-softmax over the full vocabulary of each level. A leaf is used at most as often as it has items.
    """
    state = _search(model, trie, history, history_mask, width, items or model.config.session_items)
    return finish(state)


@torch.no_grad()
def free_search(
    model: OneRec, history: Tensor, history_mask: Tensor, *, width: int, items: int | None = None
) -> FreeBeams:
    """The same search over all codes, without a trie: what it writes is not always an item (for comparison only)."""
    state = _search(model, None, history, history_mask, width, items or model.config.session_items)
    return FreeBeams(state.written.unflatten(2, (-1, model.config.levels)), state.scores)


def _search(
    model: OneRec, trie: TrieTensors | None, history: Tensor, history_mask: Tensor, width: int, items: int
) -> State:
    state, memory = first_item(model, trie, history, history_mask, width=width)
    for _ in range(items - 1):
        state = next_item(model, trie, state, memory)
    return state


def first_item(
    model: OneRec, trie: TrieTensors | None, history: Tensor, history_mask: Tensor, *, width: int
) -> tuple[State, Memory]:
    """Encode the history, then write the first item from the single beam [BOS]."""
    encoded, mask = model.encode(history, history_mask)
    memory = Memory(model.cross_kv(encoded), mask)
    users = history.shape[0]
    bos = model.embed_bos().expand(users, 1, -1)
    positions = torch.arange(1, device=history.device)
    hidden, cache = model.decode(bos, positions, None, memory.cross_kv, memory.mask)
    # One beam a user: zeros made from `hidden`, so that the exporter sees where their batch size comes from.
    scores = hidden[:, :, 0].float() * 0.0
    return _write(model, trie, scores, None, cache, hidden, memory, width), memory


def next_item(model: OneRec, trie: TrieTensors | None, state: State, memory: Memory) -> State:
    """Feed [s_L, BOS] as one block, then write the next item of every beam."""
    users, width = state.scores.shape
    last = model.embed_code(model.config.levels - 1, state.last)
    block = torch.stack((last, model.embed_bos().expand_as(last)), dim=2).flatten(0, 1)
    past = state.cache[0][0].shape[2]
    positions = torch.arange(past, past + 2, device=block.device)
    hidden, cache = model.decode(block, positions, state.cache, memory.cross_kv, memory.mask)
    hidden = hidden[:, 1].view(users, width, -1)
    return _write(model, trie, state.scores, state.written, cache, hidden, memory, width)


def finish(state: State) -> Beams:
    """The beams of a constrained search, the dead ones marked."""
    alive = state.scores > SENTINEL
    return Beams(torch.where(alive.unsqueeze(-1), state.written, -1), torch.where(alive, state.scores, SENTINEL))


def _write(
    model: OneRec,
    trie: TrieTensors | None,
    scores: Tensor,
    taken: Tensor | None,
    cache: list[KeyValue],
    hidden: Tensor,
    memory: Memory,
    width: int,
) -> State:
    """Write one item, L codes, behind BOS, from which the decoder made `hidden` [B, W0, d].

    scores [B, W0]; taken: what is written so far (`State.written`), None at the first item.
    """
    levels = model.config.levels
    node = token = hidden  # placeholders: nothing reads them before level 0 sets them
    codes: list[Tensor] = []
    for level in range(levels):
        if level > 0:
            past = cache[0][0].shape[2]
            fed = model.embed_code(level - 1, token).flatten(0, 1).unsqueeze(1)
            positions = torch.arange(past, past + 1, device=fed.device)
            hidden, cache = model.decode(fed, positions, cache, memory.cross_kv, memory.mask)
            hidden = hidden.unflatten(0, (-1, width)).squeeze(2)
        totals = scores.unsqueeze(-1) + torch.log_softmax(model.head(level, hidden).float(), dim=-1)
        totals, children = legal(trie, level, levels, totals, node, taken)
        before, candidates = totals.shape[1:]
        scores, parent, slot = _step(totals, width)
        cache = _reorder(cache, parent, before)
        taken = None if taken is None else _of_parent(taken, parent)
        codes = [code.gather(1, parent) for code in codes]
        if children is None:
            node = token = slot
        else:
            place = parent * candidates + slot
            node, token = (part.flatten(1).gather(1, place) for part in (children.nodes, children.codes))
        codes.append(token)
    if trie is None:
        item = torch.stack(codes, dim=2)
    else:
        item = (_at(trie["leaf0"], node) if levels == 1 else node).unsqueeze(-1)
    return State(scores, item if taken is None else torch.cat((taken, item), dim=2), token, cache)


def legal(
    trie: TrieTensors | None, level: int, levels: int, totals: Tensor, node: Tensor, taken: Tensor | None
) -> tuple[Tensor, Children | None]:
    """What of `totals` [B, W, K] may be written at `level`: [B, W, C], SENTINEL where not, and whose children they are.

    node [B, W]: the node of the level above, not read at level 0; taken [B, W, i]: leaves used, None for none. At level 0,
    and without a trie, C = K and there are no children: a candidate is its code.
    """
    children = None
    if trie is not None:
        if level > 0:
            children = _children(trie, level, node)
            totals = torch.where(children.real, totals.gather(2, children.codes), SENTINEL)
        else:
            totals = torch.where(trie["capacity0"] > 0, totals, SENTINEL)
        if taken is not None:
            totals = _without_spent(trie, level, levels, totals, node, taken)
    return totals, children


def _step(totals: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `width` best of `totals` [B, W0, C]: scores, and which beam and candidate each comes from, all [B, W]."""
    before, candidates = totals.shape[1:]
    totals = totals.flatten(1)
    if before > 1:
        scores, best = top(totals, width)
        parent = best // candidates
        slot = best - parent * candidates  # the exporter has no remainder by a size known only at run time
    else:
        if candidates < width:
            totals = F.pad(totals, (0, width - candidates), value=SENTINEL)
        scores, best = top(totals, width)
        parent, slot = torch.zeros_like(best), best.clamp(max=candidates - 1)
    return scores.clamp(min=SENTINEL), parent, slot


class Children(NamedTuple):
    """Children of each beam's node, int64 [B, W, C]; `real` is False where a node has fewer than C."""

    nodes: Tensor
    codes: Tensor
    real: Tensor


def _children(trie: TrieTensors, level: int, node: Tensor) -> Children:
    """The children at `level` of each beam's `node` [B, W] of the level above."""
    start, end = _span(trie, level, node)
    child = start + trie[f"slots{level}"].long()
    real = child < end
    child = torch.minimum(child, (end - 1).clamp(min=0))
    return Children(child, _at(trie[f"tokens{level}"], child), real)


def _span(trie: TrieTensors, level: int, node: Tensor) -> tuple[Tensor, Tensor]:
    """First child and one past the last child [B, W, 1] of each beam's `node` [B, W] of the level above."""
    pointers = trie[f"pointers{level}"]
    return _at(pointers, node).unsqueeze(-1), _at(pointers, node + 1).unsqueeze(-1)


def _at(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]` as int64 in the shape of `index`; index_select is a plain Gather in ONNX, indexing is not."""
    return table.index_select(0, index.flatten()).view(index.shape).long()


def _without_spent(
    trie: TrieTensors, level: int, levels: int, totals: Tensor, node: Tensor, taken: Tensor
) -> Tensor:
    """`totals` [B, W, C] with SENTINEL at each candidate below which the session has already used every item.

    taken [B, W, i]: leaves used. Looking ahead from every level, not only from the last, keeps a beam from dying later.
    """
    used = taken.clamp(min=0)
    if level < levels - 1 or level == 0:
        used = _at(trie[f"ancestor{level}"], used)
    uses = (used.unsqueeze(-1) == used.unsqueeze(-2)).sum(-1)
    spent = uses >= _at(trie[f"capacity{level}"], used)
    if level > 0:
        start, end = _span(trie, level, node)
        spent = spent & (used >= start) & (used < end)
        used = torch.minimum((used - start).clamp(min=0), trie[f"slots{level}"][-1].long())
    return totals.scatter_reduce(2, used, torch.where(spent, SENTINEL, -SENTINEL), "amin")


def top(totals: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest of `totals` [B, n], falling, equals by the lower index: values and indices [B, width]."""
    if torch.compiler.is_exporting():
        return torch.topk(totals, width, dim=1)  # ONNX's TopK gives equals by the lower index, torch's leaves it open
    values, indices = torch.topk(totals, min(width + 1, totals.shape[1]), dim=1)
    if bool(((values[:, 1:] == values[:, :-1]) & (values[:, 1:] > SENTINEL)).any()):
        values, indices = torch.sort(totals, dim=1, descending=True, stable=True)
    return values[:, :width], indices[:, :width]


def _reorder(cache: list[KeyValue], parent: Tensor, before: int) -> list[KeyValue]:
    """The cache rows of each beam's `parent` [B, W], of `before` beams a user."""
    users = parent.shape[0]
    rows = (parent + torch.arange(users, device=parent.device).unsqueeze(-1) * before).flatten()
    return [(key.index_select(0, rows), value.index_select(0, rows)) for key, value in cache]


def _of_parent(values: Tensor, parent: Tensor) -> Tensor:
    """`values` [B, W0, n] of each beam's `parent` [B, W]: [B, W, n]."""
    return values.gather(1, parent.unsqueeze(-1).expand(-1, -1, values.shape[2]))
