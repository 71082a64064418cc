"""The GPT. Plain torch with explicit dtypes, so that it computes, and allocates, the same everywhere.

Shapes: B batch, T time, C n_embd, V vocab_size, H heads, K kv heads, D head size, F hidden; N = B·T.

Dtypes. Parameters and the residual stream x_BTC are in `param_dtype`. Each matmul casts its weight (and
bias) to the compute dtype `run.dtype`, norms read the residual stream and hand on the compute dtype:
what nanoGPT does under torch.autocast, written out. In float32 no cast allocates anything.

Kept for backward, by one micro-batch (sizes in elements; "compute": the compute dtype):
  embedding   the token ids [B, T] int64
  each block  norm 1: its input, which is the residual stream [B, T, C]; mean and rstd (rmsnorm: rstd) [B, T, 1] fp32;
              its output [B, T, C] compute, for c_attn
              c_attn: weight in compute [(H+2K)·D, C]; output [B, T, (H+2K)·D] compute, as q, k, v are views of it
              (rope and qk_norm make new q and k, and qk_norm keeps those it read, with rstd [B, H or K, T, 1] fp32;
              in fp32 grouped heads make k and v of all heads)
              attention: flash: output [B, H, T, D] compute and log-sum-exp [B, H, T] fp32;
              math: softmax [B, H, T, T] fp32 and its copy in compute, scaled q, output
              c_proj: weight in compute; its input is the attention's output
              norm 2, as norm 1, output for c_fc; c_fc: weight in compute
              gelu: c_fc's output [B, T, F]; relu2: that (as relu's result); swiglu: c_gate's and c_fc's outputs
              and silu(gate)
              c_proj: weight in compute, the activation [B, T, F]
              dropout: a bool mask for each place that drops
  final norm  as norm 1
  loss        chunked: gradients of the final norm's output [N, C] compute and of the head's weight [V, C] fp32
              full: the final norm's output, the head's weight in compute, log-softmax [N, V] fp32
With param_dtype equal to the compute dtype there are no weight copies. With activation checkpointing a
block keeps its input alone, and the rest while it is recomputed. With recompute_cheap a block keeps no weight
copies, norm outputs or activations of the MLP (nor silu(gate)): what they are made of is kept anyway.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

from gptfit.config import ModelConfig, RunConfig
from gptfit.device import DTYPES
from gptfit.layers import LayerNorm, Linear, Origin, RMSNorm, as_it_is, rms_norm, swiglu
from gptfit.loss import Chunk, chunked_cross_entropy, eager_chunk, full_cross_entropy, fused_chunk, soft_cap
from gptfit.offload import Offload

INIT_STD = 0.02


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """F.dropout with a bool mask on every device; F.dropout keeps a float mask where it has no fused kernel."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0.0 else x


class Tables(NamedTuple):
    """What the blocks share: rope's cosines and sines [T, D/2] in the compute dtype, the mask of attention
    written out [T, T], true where a query must not look. None where the model needs none."""

    cos_TD: Tensor | None
    sin_TD: Tensor | None
    future_TT: Tensor | None


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary embedding, first half paired with second half as Llama does (arXiv 2104.09864, section 3.4.2)."""
    a, b = x_BHTD.chunk(2, dim=-1)
    return torch.cat((a * cos_TD - b * sin_TD, b * cos_TD + a * sin_TD), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype, param_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        kv_width = config.n_kv_head * config.head_size
        self.widths = (config.n_embd, kv_width, kv_width)
        self.c_attn = Linear(config.n_embd, config.n_embd + 2 * kv_width, config.bias, dtype, param_dtype)
        self.c_proj = Linear(config.n_embd, config.n_embd, config.bias, dtype, param_dtype)

    def forward(self, x_BTC: Tensor, tables: Tables, origin: Origin | None = None) -> Tensor:
        config = self.config
        q, k, v = (
            part.unflatten(2, (-1, config.head_size)).transpose(1, 2)  # [B, T, H·D] -> [B, H, T, D], a view
            for part in self.c_attn(x_BTC, origin).split(self.widths, dim=2)
        )
        if config.qk_norm:
            q, k = rms_norm(q, None, q.dtype), rms_norm(k, None, k.dtype)
        if tables.cos_TD is not None and tables.sin_TD is not None:
            q, k = rotate(q, tables.cos_TD, tables.sin_TD), rotate(k, tables.cos_TD, tables.sin_TD)
        p = config.dropout if self.training else 0.0
        if tables.future_TT is None:
            groups = config.n_head // config.n_kv_head
            if groups > 1 and q.dtype == torch.float32:
                # CUDA's only fused kernel for fp32 knows no groups, and writing the scores out would cost B·H·T·T.
                k, v, groups = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), 1
            y_BHTD = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True, enable_gqa=groups > 1)
        else:
            y_BHTD = math_attention(q, k, v, tables.future_TT, p)
        y_BTC = y_BHTD.transpose(1, 2).flatten(2)
        y_BTC = self.c_proj(y_BTC, None if origin is None else Origin(as_it_is, (y_BTC,)))
        return dropout(y_BTC, config.dropout, self.training)


def math_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, future_TT: Tensor, p: float) -> Tensor:
    """Attention written out: the scores [B, H, T, T] exist. Softmax in fp32."""
    groups = q_BHTD.shape[1] // k_BKTD.shape[1]
    if groups > 1:
        k_BKTD, v_BKTD = k_BKTD.repeat_interleave(groups, dim=1), v_BKTD.repeat_interleave(groups, dim=1)
    scores_BHTT = (q_BHTD * q_BHTD.shape[-1] ** -0.5) @ k_BKTD.transpose(-2, -1)
    scores_BHTT = scores_BHTT.float().masked_fill_(future_TT, -math.inf)
    weights_BHTT = dropout(F.softmax(scores_BHTT, dim=-1).to(v_BKTD.dtype), p, training=True)
    return weights_BHTT @ v_BKTD


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype, param_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.c_fc = Linear(config.n_embd, config.n_hidden, config.bias, dtype, param_dtype)
        if config.mlp == "swiglu":
            self.c_gate = Linear(config.n_embd, config.n_hidden, config.bias, dtype, param_dtype)
        self.c_proj = Linear(config.n_hidden, config.n_embd, config.bias, dtype, param_dtype)

    def forward(self, x_BTC: Tensor, origin: Origin | None = None) -> Tensor:
        if origin is not None:
            return self.remaking(x_BTC, origin)
        if self.config.mlp == "swiglu":
            h_BTF = F.silu(self.c_gate(x_BTC)) * self.c_fc(x_BTC)
        elif self.config.mlp == "relu2":
            h_BTF = F.relu(self.c_fc(x_BTC)).square()
        else:
            h_BTF = F.gelu(self.c_fc(x_BTC))
        return dropout(self.c_proj(h_BTF), self.config.dropout, self.training)

    def remaking(self, x_BTC: Tensor, origin: Origin) -> Tensor:
        """The same, keeping what the activation is made of instead of the activation."""
        if self.config.mlp == "swiglu":
            made_of = Origin(swiglu, (self.c_gate(x_BTC, origin), self.c_fc(x_BTC, origin)))
        elif self.config.mlp == "relu2":
            made_of = Origin(torch.square, (F.relu(self.c_fc(x_BTC, origin)),))
        else:
            made_of = Origin(F.gelu, (self.c_fc(x_BTC, origin),))
        return dropout(self.c_proj(made_of.make(*made_of.sources), made_of), self.config.dropout, self.training)


def make_norm(config: ModelConfig, dtype: torch.dtype, param_dtype: torch.dtype) -> LayerNorm | RMSNorm:
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, dtype, param_dtype)
    return LayerNorm(config.n_embd, config.bias, dtype, param_dtype)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype, param_dtype: torch.dtype, remakes: bool) -> None:
        super().__init__()
        self.remakes = remakes  # cheap things in backward, instead of keeping them
        self.ln_1 = make_norm(config, dtype, param_dtype)
        self.attn = CausalSelfAttention(config, dtype, param_dtype)
        self.ln_2 = make_norm(config, dtype, param_dtype)
        self.mlp = MLP(config, dtype, param_dtype)

    def attend(self, x_BTC: Tensor, tables: Tables) -> Tensor:
        return self.attn(self.ln_1(x_BTC), tables, self.origin(self.ln_1, x_BTC))

    def origin(self, norm: LayerNorm | RMSNorm, x_BTC: Tensor) -> Origin | None:
        return norm.origin(x_BTC) if self.remakes and torch.is_grad_enabled() else None

    def forward(self, x_BTC: Tensor, tables: Tables, recompute: str = "none") -> Tensor:
        """`recompute` says whether attention, or nothing, is computed again in backward."""
        if recompute == "attention":
            x_BTC = x_BTC + cast(Tensor, checkpoint(self.attend, x_BTC, tables, use_reentrant=False))
        else:
            x_BTC = x_BTC + self.attend(x_BTC, tables)
        return x_BTC + self.mlp(self.ln_2(x_BTC), self.origin(self.ln_2, x_BTC))


class GPT(nn.Module):
    """The model of `run`, its parameters initialised as GPT-2's, from torch's global generator.

    Parameters are named as nanoGPT names them, where it has them.
    """

    cos_TD: Tensor | None
    sin_TD: Tensor | None
    future_TT: Tensor | None

    def __init__(self, run: RunConfig) -> None:
        super().__init__()
        self.run = run
        dtype, param_dtype = DTYPES[run.dtype], DTYPES[run.param_dtype]
        self.compute_dtype = dtype
        self.chunk: Chunk = eager_chunk
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(run.vocab_size, run.n_embd, dtype=param_dtype)})
        if run.position == "learned":
            self.transformer["wpe"] = nn.Embedding(run.block_size, run.n_embd, dtype=param_dtype)
        self.transformer["h"] = nn.ModuleList(
            Block(run, dtype, param_dtype, run.recompute_cheap) for _ in range(run.n_layer)
        )
        self.transformer["ln_f"] = make_norm(run, dtype, param_dtype)
        self.lm_head = Linear(run.n_embd, run.vocab_size, False, dtype, param_dtype)
        if run.tie_embeddings:
            self.transformer["wte"].weight = self.lm_head.weight
        self.saving: AbstractContextManager[Any] = Offload() if run.activation_offload else nullcontext()
        self._make_tables()
        self._initialise()

    def _make_tables(self) -> None:
        run = self.run
        cos = sin = future = None
        if run.position == "rope":
            rates = run.rope_theta ** -(torch.arange(0, run.head_size, 2, dtype=torch.float32) / run.head_size)
            angles_TD = torch.outer(torch.arange(run.block_size, dtype=torch.float32), rates)
            cos, sin = angles_TD.cos().to(self.compute_dtype), angles_TD.sin().to(self.compute_dtype)
        if run.attention == "math":
            future = torch.ones(run.block_size, run.block_size, dtype=torch.bool).triu(1)
        # Not persistent: they follow from the config, and checkpoints keep to parameters.
        self.register_buffer("cos_TD", cos, persistent=False)
        self.register_buffer("sin_TD", sin, persistent=False)
        self.register_buffer("future_TT", future, persistent=False)

    def _initialise(self) -> None:
        """Normal(0, 0.02); projections back into the residual stream by 1/sqrt(2·n_layer) less (GPT-2 paper, 2.3)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                std = INIT_STD / math.sqrt(2 * self.run.n_layer) if name.endswith("c_proj.weight") else INIT_STD
                nn.init.normal_(parameter, mean=0.0, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, idx_BT: Tensor) -> Tensor:
        """The final norm's output [B, T, C] in the compute dtype: everything but the head."""
        run, time = self.run, idx_BT.shape[1]
        x_BTC = self.transformer["wte"](idx_BT)
        if run.position == "learned":
            x_BTC = x_BTC + cast(nn.Embedding, self.transformer["wpe"]).weight[:time]
        x_BTC = dropout(x_BTC, run.dropout, self.training)
        tables = self._tables(time)
        recompute = run.activation_checkpointing if self.training and torch.is_grad_enabled() else "none"
        for index, block in enumerate(cast(nn.ModuleList, self.transformer["h"])):
            here = recompute if index % run.checkpoint_every == 0 else "none"
            if here == "block":
                x_BTC = checkpoint(block, x_BTC, tables, use_reentrant=False)
            else:
                x_BTC = block(x_BTC, tables, here)
        return self.transformer["ln_f"](x_BTC)

    def _tables(self, time: int) -> Tables:
        cos, sin, future = self.cos_TD, self.sin_TD, self.future_TT
        return Tables(
            None if cos is None else cos[:time],
            None if sin is None else sin[:time],
            None if future is None else future[:time, :time],
        )

    def forward(self, idx_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross entropy over the targets, fp32; target -1 is ignored. Logits never leave this function:
        a caller who holds them, holds [B, T, V] through the whole backward."""
        run = self.run
        with self.saving:
            x_NC, targets_N = self.hidden(idx_BT).flatten(0, 1), targets_BT.flatten()
            if run.loss == "chunked":
                weight, size, dtype = self.lm_head.weight, run.loss_chunk_size, self.compute_dtype
                return chunked_cross_entropy(x_NC, weight, targets_N, size, dtype, run.logit_softcap, self.chunk)
            return full_cross_entropy(soft_cap(self.lm_head(x_NC), run.logit_softcap), targets_N)

    @torch.no_grad()
    def logits(self, idx_BT: Tensor) -> Tensor:
        """Logits of the token after the last one, [B, V] fp32, for sampling."""
        return soft_cap(self.lm_head(self.hidden(idx_BT)[:, -1]), self.run.logit_softcap).float()


def set_memory_budget(run: RunConfig) -> None:
    """Says what share of its usual activations a compiled graph may keep for backward. torch reads it where it cuts a
    graph into forward and backward: at the first forward, and at a later one of other shapes."""
    functorch_config.activation_memory_budget = run.activation_memory_budget


def compile_model(model: GPT, **options: Any) -> None:
    """Compiles `model` in place; `options` are torch.compile's. With the chunked loss everything but its matmuls:
    the loop over chunks would be unrolled into the graph. Its softmax is compiled for each shape of a chunk: the full
    one and the rest, in training and in evaluation, which is half of what torch recompiles before it gives up."""
    set_memory_budget(model.run)
    if model.run.loss == "chunked":
        model.hidden = torch.compile(model.hidden, **options)
        model.chunk = torch.compile(fused_chunk, **{**options, "dynamic": False})
    else:
        model.compile(**options)
