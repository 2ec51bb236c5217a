"""Repetition, presence and frequency penalties on logits.

Three of them, each row with its own. `repetition` divides positive logits and multiplies negative ones of whatever
stands in the prompt or the output so far (CTRL, 2019); `presence` and `frequency` subtract, once and once an
occurrence, from tokens of the output alone (OpenAI's). 1, 0 and 0 leave a row as it is.

A table of counts, rows × vocabulary, would have to be kept, grown with each token and mended whenever a speculated
token is taken back. The row's tokens are there anyway: so each program, which owns a run of the vocabulary, counts
those of them that fall into it (a histogram of whole numbers: the order is no matter), and nothing is kept.

What follows is `sample`; and the log-probability of what was drawn, by the model alone, is
`-cross_entropy(logits, tokens, reduction="none")`: one launch each, and the host waits for none.

R rows of logits, V vocabulary, S sequences, L the longest.
"""

import torch

from .core.lang import cdiv, next_power_of_2, tl, triton, wide
from .core.launch import launch, launcher
from .core.op import Budget, Case, Op
from .core.tuned import tuned


def _penalize(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    sequences: torch.Tensor,
    prompt_lens: torch.Tensor,
    lengths: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    """`logits` (R, V) after each row's penalties (R,), for the sequence `sequences[r]` of `tokens` (S, L).

    Of that sequence count the first `lengths[r]` tokens; the first `prompt_lens[r]` of them are its prompt.
    """
    L, V = tokens.shape[1], logits.shape[1]
    tokens_RL = tokens[sequences.long()].long()
    place_L = torch.arange(L, device=logits.device)
    known_RL = (place_L < lengths[:, None]) & (tokens_RL >= 0) & (tokens_RL < V)
    written_RL = known_RL & (place_L >= prompt_lens[:, None])
    tokens_RL = tokens_RL.where(known_RL, 0)
    seen_RV, counts_RV = (
        torch.zeros(logits.shape, dtype=torch.int32, device=logits.device).scatter_add_(1, tokens_RL, mask.int())
        for mask in (known_RL, written_RL)
    )
    x = logits.to(wide(logits))
    factor_R1, presence_R1, frequency_R1 = (p.to(x.dtype)[:, None] for p in (repetition, presence, frequency))
    x = torch.where(seen_RV > 0, torch.where(x > 0, x / factor_R1, x * factor_R1), x)
    return (x - frequency_R1 * counts_RV - presence_R1 * (counts_RV > 0)).to(logits.dtype)


# ---- fused ----


@triton.jit
def penalize_kernel(
    x_ptr, token_ptr, sequence_ptr, prompt_ptr, length_ptr, repetition_ptr, presence_ptr, frequency_ptr, y_ptr,
    V, x_row, x_col, token_row,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens of the vocabulary of one row."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    repetition = tl.load(repetition_ptr + row).to(tl.float32)
    presence = tl.load(presence_ptr + row).to(tl.float32)
    frequency = tl.load(frequency_ptr + row).to(tl.float32)
    x = tl.load(x_ptr + row * x_row + col * x_col, mask=col < V, other=0.0).to(tl.float32)
    if (repetition != 1) | (presence != 0) | (frequency != 0):
        prompt, length = tl.load(prompt_ptr + row).to(tl.int32), tl.load(length_ptr + row).to(tl.int32)
        history = token_ptr + tl.load(sequence_ptr + row).to(tl.int64) * token_row
        seen = tl.zeros([BLOCK], tl.int32)
        written = tl.zeros([BLOCK], tl.int32)
        for start in range(0, length, CHUNK):
            place = start + tl.arange(0, CHUNK)
            token = tl.load(history + place, mask=place < length, other=-1).to(tl.int32)
            here = (token >= 0) & (token // BLOCK == tl.program_id(1))
            bin = tl.where(here, token % BLOCK, 0)
            seen += tl.histogram(bin, BLOCK, mask=here)
            written += tl.histogram(bin, BLOCK, mask=here & (place >= prompt))
        x = tl.where(seen > 0, tl.where(x > 0, x / repetition, x * repetition), x)
        x -= frequency * written.to(tl.float32) + tl.where(written > 0, presence, 0.0)
    tl.store(y_ptr + row * V + col, x.to(y_ptr.dtype.element_ty), mask=col < V)


@launcher
def penalize_launch(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    sequences: torch.Tensor,
    prompt_lens: torch.Tensor,
    lengths: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    R, V = logits.shape
    y = torch.empty(R, V, dtype=logits.dtype, device=logits.device)
    tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
    block = min(1024, max(128, next_power_of_2(V)))
    tile = tuned("penalize", logits.device, next_power_of_2(V), {"BLOCK": block, "CHUNK": 256, "num_warps": 4})
    launch(
        penalize_kernel, (R, cdiv(V, tile["BLOCK"])),
        logits, tokens, sequences, prompt_lens, lengths, repetition, presence, frequency, y,
        V, *logits.stride(), tokens.stride(0), **tile,
    )  # fmt: skip
    return y


def _rows(m, R, V, lengths, repetition, presence, frequency, L=None):
    """Test case: sequences in reverse order, half of each its prompt; few distinct tokens, so that they repeat."""
    tokens = m.integers(0, min(V, 40), R, L or max(lengths) + 2, dtype=torch.int32)
    sequences = m.tensor(list(range(R))[::-1])
    prompts, lengths = m.tensor([n // 2 for n in lengths], dtype=torch.int32), m.tensor(lengths)
    penalties = (m.tensor(x, dtype=torch.float32) for x in (repetition, presence, frequency))
    return m.normal(R, V, scale=3.0, grad=False), tokens, sequences, prompts, lengths, *penalties


penalize = Op(
    name="penalize",
    reference=_penalize,
    fused=penalize_launch,
    shapes="logits R V, tokens S L, sequences R, prompt_lens R, lengths R, repetition R, presence R, frequency R",
    rows=("logits", "sequences", "prompt_lens", "lengths", "repetition", "presence", "frequency"),
    cases=[
        Case(
            "each alone", lambda m: _rows(m, 4, 300, [9, 30, 30, 30], [1.0, 1.5, 1, 1], [0, 0, 0.7, 0], [0, 0, 0, 0.3])
        ),
        Case("all at once", lambda m: _rows(m, 2, 2300, [70, 1300], [1.3, 0.8], [0.5, -0.4], [0.1, 0.2])),
        Case("nothing yet", lambda m: _rows(m, 2, 50, [0, 1], [2.0] * 2, [1.0] * 2, [1.0] * 2)),
        Case(
            "64x128256 after 4096",
            lambda m: _rows(m, 64, 128256, [4096] * 64, [1.1] * 64, [0.1] * 64, [0.1] * 64),
            bench=True,
        ),
    ],
    budget=Budget(registers=96, vector=True),
    traffic=lambda logits, *_: (2 * logits.nbytes, 0),
)
