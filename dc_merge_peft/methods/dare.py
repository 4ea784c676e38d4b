"""DARE: drop entries at random and scale up the rest, then add up or elect signs."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor

from dc_merge_peft.methods.elementwise import Reduce, masked, total
from dc_merge_peft.methods.options import option
from dc_merge_peft.methods.spaces import Aggregate, SpaceConfig, SwitchedMethod, View, Views
from dc_merge_peft.methods.ties import REDUCE_HELP, Trim, sign_consensus

DROP_HELP = "probability that an entry is dropped; the others are divided by 1 - drop"
SEED_HELP = "seed of the random numbers: the same seed gives the same result on every machine"
REFERENCE = (
    "Yu et al., Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch, ICML 2024"
)
LINK = "https://arxiv.org/abs/2311.03099"


def drop_entries(view: View, task: int, drop: float, seed: int) -> Tensor:
    """Task i's matrix with entries dropped, its expectation unchanged.

    Each module of each adapter has a generator of its own, so that the result depends on nothing but the seed, the
    module's name and the adapter's place: not on the order of modules, threads or devices.
    """
    X = view.matrix(task)
    if drop == 0:
        return X
    label = f"{seed}/{view.module.name}/{view.module.adapters[task]}"
    digest = hashlib.blake2b(label.encode(errors="surrogatepass"), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    kept = torch.rand(X.shape, generator=generator, dtype=torch.float32, device="cpu")
    return masked(X, torch.ge(kept, drop, out=kept).to(X)).div_(1 - drop)


def dropping(drop: float, seed: int) -> Trim:
    """:func:`drop_entries` in the place where TIES trims."""
    return lambda view, task: drop_entries(view, task, drop, seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DareTAConfig(SpaceConfig):
    """Options of DARE with task arithmetic."""

    drop: float = option(0.5, DROP_HELP, minimum=0, maximum=0.99)
    seed: int = option(0, SEED_HELP)


class DareTA(SwitchedMethod):
    """DARE (Yu et al., ICML 2024) with task arithmetic: each entry of each task is dropped with probability ``drop``, the
    others divided by ``1 - drop``, and the tasks added up."""

    name = "dare_ta"
    title = "DARE with task arithmetic: random dropping, then the sum"
    reference = REFERENCE
    link = LINK
    Config = DareTAConfig
    config: DareTAConfig

    def survey(self, views: Views) -> Aggregate:
        dropped = dropping(self.config.drop, self.config.seed)
        return lambda view: total(dropped(view, task) for task in range(len(view.module.tasks)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DareTIESConfig(DareTAConfig):
    """Options of DARE with TIES."""

    reduce: Reduce = option("mean", REDUCE_HELP)


class DareTIES(SwitchedMethod):
    """DARE (Yu et al., ICML 2024) with TIES: random dropping in the place of trimming, then the elected signs.

    That is what KnOTS, PEFT and mergekit mean by it. The authors' own program drops first and runs the whole of TIES then,
    with its trimming to a fifth: the same from about ``drop=0.8`` on, where no more than that is left.
    """

    name = "dare_ties"
    title = "DARE with TIES: random dropping, then the entries that agree in sign"
    reference = REFERENCE
    link = LINK
    Config = DareTIESConfig
    config: DareTIESConfig

    def survey(self, views: Views) -> Aggregate:
        options = self.config
        return sign_consensus(views, dropping(options.drop, options.seed), options.reduce)
