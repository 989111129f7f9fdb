"""The models of the demo, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastkd


class Block(nn.Module):
    """Pre-norm causal attention and a feed-forward layer; both start as the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + torch.as_tensor(self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)))))


class LanguageModel(nn.Module):
    """A decoder-only transformer: token ids [B, L] -> logits [B, L, V]. The embedding is the output matrix too.

    The output's bias starts at the tokens' log-frequencies: a run of some hundred steps would otherwise go to learning
    those.
    """

    def __init__(self, log_frequencies: Tensor, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(log_frequencies), width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.RMSNorm(width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("_out.weight"):
                nn.init.zeros_(parameter)
        self.bias = nn.Parameter(log_frequencies.clone())

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(*self.before_logits(ids)[:3])

    def before_logits(self, ids: Tensor) -> fastkd.LinearLogits:
        """The logits, not yet computed."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return fastkd.LinearLogits(self.norm(self.blocks(x)), self.tokens.weight, self.bias)


def mlp(inputs: int, hidden: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))
