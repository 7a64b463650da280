"""The oracle: what skipping means (docs/method.md), in plain PyTorch over the transformers model. Slow
and obvious.

One teacher-forced pass says it all: every layer sees every token's hidden state, so the K and V of a skipped token come
from its own input, and later tokens attend to everything. A free-running generation repeats the pass for each new
token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dash_export.decision import DENSE_POSITIONS, Action, Damages, DecisionRule, decision_points
from dash_export.models import Checkpoint
from dash_export.skip_policy import HISTORY, SkipPolicy
from dash_export.torch_model import torch_model


@dataclass(frozen=True)
class Pass:
    """logits [tokens, vocab] float32, actions int8 and damage float32 [tokens, layers] (damage 0 where not gated)."""

    logits: npt.NDArray[np.float32]
    actions: npt.NDArray[np.int8]
    damage: npt.NDArray[np.float32]


class Oracle:
    """A checkpoint and its skip policy in float32."""

    def __init__(self, checkpoint: Checkpoint, policy: SkipPolicy) -> None:
        weights = {name: weight.read_rows(0, weight.shape[0]) for name, weight in checkpoint.weights.items()}
        self.model = torch_model(checkpoint.config, weights, torch.float32, attention="eager")
        self.policy = policy
        self.eps = checkpoint.spec.rms_norm_eps

    @torch.no_grad()
    def forward(
        self,
        ids: npt.NDArray[np.int64],
        rule: DecisionRule | None = None,
        actions: npt.NDArray[np.int8] | None = None,
        prefix: int = DENSE_POSITIONS,
    ) -> Pass:
        """One pass over ids [tokens]: dense, with `actions` [tokens, layers] forced, or decided by `rule` after
        `prefix` dense tokens.
        """
        decoder = self.model.model
        hidden = decoder.embed_tokens(torch.from_numpy(ids)[None])
        count, layers = len(ids), len(decoder.layers)
        rotary = decoder.rotary_emb(hidden, torch.arange(count)[None])
        mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
        taken = np.zeros((count, layers), np.int8)
        damage = np.zeros((count, layers), np.float32)
        executed = np.zeros(count, np.int64)
        dense = np.arange(count) < max(prefix, DENSE_POSITIONS)
        points = decision_points(self.policy.gated, self.policy.reads)
        read_at = {layers[0]: read for read, layers in points.items()}
        inputs: list[torch.Tensor] = []
        settled: Damages = damage.T
        for index, layer in enumerate(decoder.layers):
            inputs.append(hidden[0])
            if self.policy.network is not None and index in read_at:
                for decided in points[read_at[index]]:
                    damage[:, decided] = self.damage(inputs[read_at[index]], taken, decided)
                if rule is not None:
                    settled = rule.settled(damage.T)
            if actions is not None:
                taken[:, index] = actions[:, index]
            elif rule is not None and index in self.policy.gated:
                taken[:, index] = np.where(dense, Action.RUN, rule.decide(index, settled[index], executed))
            ran = layer(hidden, attention_mask=mask, position_embeddings=rotary)
            ran = ran[0] if isinstance(ran, tuple) else ran
            skip = torch.from_numpy(taken[:, index] == Action.SKIP)[None, :, None]
            hidden = torch.where(skip, hidden + self.compensation(hidden, index), ran) if skip.any() else ran
            executed += taken[:, index] == Action.RUN
        logits = self.model.lm_head(decoder.norm(hidden))[0]
        return Pass(logits.numpy(), taken, damage)

    def generate(
        self, ids: npt.NDArray[np.int64], tokens: int, rule: DecisionRule | None = None
    ) -> tuple[npt.NDArray[np.int64], Pass]:
        """Greedy, free-running: `tokens` new ids after the dense prompt. Returns all ids and the last pass."""
        prompt = len(ids)
        for _ in range(tokens):
            result = self.forward(ids, rule, prefix=prompt)
            ids = np.append(ids, result.logits[-1].argmax())
        return ids, result

    def damage(self, state: torch.Tensor, actions: npt.NDArray[np.int8], layer: int) -> npt.NDArray[np.float32]:
        """The policy network for gated `layer`: state [tokens, hidden] = the input that it reads, actions [tokens,
        layers] so far -> [tokens].
        """
        network = self.policy.network
        assert network is not None
        row = self.policy.gated.index(layer)
        weight = {name: torch.tensor(stacked[row]) for name, stacked in network.items()}
        score = self.normed(state) @ weight["state"] + weight["bias"]
        if "actions" in weight:
            history = np.zeros((len(actions), HISTORY), np.float32)
            for column, earlier in enumerate(range(layer - HISTORY, layer)):
                if earlier >= 0:
                    history[:, column] = actions[:, earlier]
            score = score + torch.from_numpy(history) @ weight["actions"]
        score = torch.relu(score) @ weight["out"] + weight["out_bias"] if "out" in weight else score[:, 0]
        return torch.nn.functional.softplus(score).numpy()

    def compensation(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        """What is added for a skipped layer, hidden [..., hidden] -> the same shape."""
        compensation = self.policy.compensation
        if compensation.kind == "none":
            return torch.zeros_like(hidden)
        weight = {
            name: torch.tensor(stacked[self.policy.gated.index(layer)])
            for name, stacked in compensation.weights.items()
        }
        if compensation.kind == "scale":
            return hidden * weight["factor"]
        return self.normed(hidden) @ weight["down"] @ weight["up"]

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """RMSNorm of unit gain."""
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)
