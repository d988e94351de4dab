"""A contextual bandit that picks a policy for each document from what its first tokens look like.

Letters: D documents, A arms (policies with options), F features.

It learns from a table of rewards ``[D, A]``, for example tokens per second over LRU's, that a simulator has
filled: when it picks an arm it sees that arm's reward alone. Regret is counted against the best arm for all
documents and against the best arm of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specgate.errors import ConfigError
from specgate.policy.base import Policy
from specgate.policy.registry import policy
from specgate.policy.workload import Workload

Floats = NDArray[np.float64]
#: What is known of a document after its first tokens, in the order of the feature vector.
FEATURES = ("one", "spread", "repeats", "distinct", "width", "most", "entropy", "mass")
EXPLORERS = ("linucb", "thompson")
CANDIDATES = (
    {"name": "lru"},
    {"name": "lfru"},
    {"name": "priced", "part": "evict_only"},
    {"name": "priced", "depth": 1},
    {"name": "priced", "depth": 4},
    {"name": "priced", "depth": 4, "adaptive": True},
)


@dataclass(frozen=True)
class Regret:
    """What a run over documents gave up.

    Attributes:
        choices_D: the arm of each document.
        reward: sum of what was earned.
        best_fixed: the arm that would have earned most on all documents, and what it would have.
        best_each: what the best arm of each document would have earned.
        random: what choosing at random earns on average.
    """

    choices_D: NDArray[np.int64]
    reward: float
    best_fixed: tuple[int, float]
    best_each: float
    random: float

    @property
    def against_fixed(self) -> float:
        """Lost against the best fixed arm; negative if the context was worth more than learning cost."""
        return self.best_fixed[1] - self.reward

    @property
    def against_each(self) -> float:
        """Lost against the best arm of each document; never negative."""
        return self.best_each - self.reward


class Bandit:
    """The ``bandit`` selection among policies.

    LinUCB (Li et al., 2010, arXiv:1003.0146) or Thompson sampling (Agrawal and Goyal, 2012, arXiv:1209.3352),
    with one ridge regression of reward on features per arm.

    Args:
        candidates: the arms: ``name`` of a policy, and its options.
        explorer: ``linucb`` or ``thompson``.
        explore: width of the confidence bound, or scale of the sampled noise; 0 is greedy.
        ridge: strength of the prior, in documents.
        prior: what an arm is expected to earn before it was tried; 1 is LRU's reward. More than any arm earns
            makes sure that each is tried.
        first_tokens: steps of a document that its features are taken from.
        rounds: how often it goes through the documents that it learns from before it is judged.
        seed: of Thompson sampling.

    Raises:
        ConfigError: no candidates, or values that make no sense.
    """

    name = "bandit"

    def __init__(
        self,
        candidates: Sequence[dict[str, Any]] = CANDIDATES,
        explorer: str = "linucb",
        explore: float = 0.1,
        ridge: float = 1.0,
        prior: float = 1.5,
        first_tokens: int = 8,
        rounds: int = 3,
        seed: int = 0,
    ) -> None:
        if not candidates:
            raise ConfigError("candidates=[] leaves nothing to choose from; name at least one policy.")
        if explorer not in EXPLORERS:
            raise ConfigError(f"explorer={explorer} is unknown; choose one of {', '.join(EXPLORERS)}.")
        if not explore >= 0 or not ridge > 0:
            raise ConfigError(f"explore={explore} and ridge={ridge} must be at least 0 and above 0.")
        if first_tokens < 1:
            raise ConfigError(f"first_tokens={first_tokens} show nothing; choose 1 or more.")
        self.candidates = [dict(c) for c in candidates]
        self.policies: list[Policy] = [policy(**c) for c in self.candidates]
        self.explorer, self.explore, self.ridge = explorer, explore, ridge
        if rounds < 1:
            raise ConfigError(f"rounds={rounds} teach nothing; choose 1 or more.")
        self.prior, self.first_tokens, self.rounds, self.seed = prior, first_tokens, rounds, seed
        self.reset()

    @property
    def labels(self) -> list[str]:
        """Of the arms: a policy's name and options."""
        return [
            " ".join([c["name"], *(f"{k}={_shown(v)}" for k, v in c.items() if k != "name")])
            for c in self.candidates
        ]

    def reset(self) -> None:
        """Forgets what was learned."""
        A, F = len(self.candidates), len(FEATURES)
        self.precision_AFF: Floats = np.repeat(np.eye(F)[None] * self.ridge, A, axis=0)
        self.evidence_AF: Floats = np.zeros((A, F))
        self.evidence_AF[:, 0] = self.ridge * self.prior  # on the feature that is always 1
        self.random = np.random.default_rng(self.seed)

    def expected_A(self, features_F: Floats) -> Floats:
        """Reward that each arm is expected to earn."""
        weights_AF = np.linalg.solve(self.precision_AFF, self.evidence_AF[..., None])[..., 0]
        return np.asarray(weights_AF @ features_F)

    def choose(self, features_F: Floats, learning: bool = True) -> int:
        """An arm; without ``learning`` the one expected to earn most. Ties go to the first."""
        expected_A = self.expected_A(features_F)
        if learning and self.explore > 0:
            covariance_AFF = np.linalg.inv(self.precision_AFF)
            if self.explorer == "linucb":
                doubt_A = np.einsum("f,afg,g->a", features_F, covariance_AFF, features_F)
                expected_A = expected_A + self.explore * np.sqrt(np.maximum(doubt_A, 0.0))
            else:
                expected_A = np.array(
                    [
                        features_F @ self.random.multivariate_normal(mean, self.explore**2 * covariance)
                        for mean, covariance in zip(
                            np.linalg.solve(self.precision_AFF, self.evidence_AF[..., None])[..., 0],
                            covariance_AFF,
                            strict=True,
                        )
                    ]
                )
        return int(expected_A.argmax())

    def learn(self, features_F: Floats, arm: int, reward: float) -> None:
        """Takes note of what an arm earned."""
        self.precision_AFF[arm] += np.outer(features_F, features_F)
        self.evidence_AF[arm] += reward * features_F

    def run(self, features_DF: Floats, rewards_DA: Floats, learning: bool = True, rounds: int = 1) -> Regret:
        """Documents in order, one choice each; of several rounds the last one is reported.

        Args:
            features_DF: see :func:`features_of`.
            rewards_DA: what each arm would earn; of the order of 1 (LRU's is 1, say), only the chosen one is
                looked at.
            learning: explore and take note; False judges what was learned before.

        Raises:
            ConfigError: tables that do not fit together.
        """
        D, A = rewards_DA.shape
        if features_DF.shape != (D, len(FEATURES)) or len(self.candidates) != A or D == 0:
            raise ConfigError(
                f"Rewards of {D} documents and {A} arms do not fit features {features_DF.shape} and "
                f"{len(self.candidates)} candidates; make the tables anew."
            )
        choices_D = np.zeros(D, dtype=np.int64)
        for _ in range(rounds):
            for d in range(D):
                arm = self.choose(features_DF[d], learning)
                choices_D[d] = arm
                if learning:
                    self.learn(features_DF[d], arm, float(rewards_DA[d, arm]))
        total_A = rewards_DA.sum(axis=0)
        return Regret(
            choices_D,
            float(rewards_DA[np.arange(D), choices_D].sum()),
            (int(total_A.argmax()), float(total_A.max())),
            float(rewards_DA.max(axis=1).sum()),
            float(rewards_DA.mean(axis=1).sum()),
        )

    def features_of(self, document: Workload) -> Floats:
        """Of one document, from its first tokens."""
        return features_of(document, self.first_tokens)

    def state(self) -> dict[str, Any]:
        """What was learned, as plain values."""
        return {"precision": self.precision_AFF.tolist(), "evidence": self.evidence_AF.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """From :meth:`state`.

        Raises:
            ConfigError: of other candidates.
        """
        precision, evidence = np.array(state["precision"], float), np.array(state["evidence"], float)
        if precision.shape != self.precision_AFF.shape or evidence.shape != self.evidence_AF.shape:
            raise ConfigError(
                f"A state of {len(precision)} arms is none of {len(self.candidates)} candidates; train anew."
            )
        self.precision_AFF, self.evidence_AF = precision, evidence


def _shown(value: Any) -> str:
    """As a configuration has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def features_of(document: Workload, first_tokens: int) -> Floats:
    """What the first tokens of a document look like, ``[F]``, all 0 to 1 (see FEATURES).

    one: 1; spread: entropy of the use of experts, mean over layers, 1 is even; repeats: share of an event's
    experts that the step before used too; distinct: different experts among all uses; width: share of a
    layer's experts in an event; most, entropy: the greatest probability and the normalised entropy of the
    forecasts of the next event; mass: their sum over K. Without forecasts the last three are 0.
    """
    L, E = document.layers, document.experts
    part = document.part(0, min(first_tokens, document.steps))
    counts_LE = part.use_counts_LE().astype(np.float64)
    share_LE = counts_LE / np.maximum(counts_LE.sum(-1, keepdims=True), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy_L = -np.where(share_LE > 0, share_LE * np.log(share_LE), 0.0).sum(-1) / np.log(max(E, 2))
    used = [set(part.event(n)) for n in range(part.events)]
    again = [len(used[n] & used[n - L]) / max(len(used[n]), 1) for n in range(L, part.events)]
    uses = max(len(part.expert_M), 1)
    seen = [0.0, 0.0, 0.0]
    f = part.forecasts
    if f is not None and len(f.p_M):
        point_M = np.repeat(np.arange(part.points), np.diff(f.start_P1))
        next_M = f.horizon_M == 1
        point_M, p_M = point_M[next_M], f.p_M[next_M].astype(np.float64)
        sum_P = np.bincount(point_M, weights=p_M, minlength=part.points)
        most_P = np.zeros(part.points)
        np.maximum.at(most_P, point_M, p_M)
        share_M = p_M / np.maximum(sum_P[point_M], 1e-12)
        bits_M = -share_M * np.log(np.maximum(share_M, 1e-12)) / np.log(max(E, 2))
        entropy_P = np.bincount(point_M, weights=bits_M, minlength=part.points)
        some = sum_P > 0
        if some.any():
            widest = max(part.widest, part.top_k)
            mass = float(sum_P[some].mean()) / widest
            seen = [float(most_P[some].mean()), float(entropy_P[some].mean()), mass]
    values = [
        1.0,
        float(entropy_L.mean()),
        float(np.mean(again)) if again else 0.0,
        float((counts_LE > 0).sum()) / uses,
        float(np.mean([len(u) for u in used])) / E if used else 0.0,
        *seen,
    ]
    return np.clip(np.array(values), 0.0, 1.0)
