"""Training an adapter: PEFT opens it, the bits survive kills, and processes share it as they share full training."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from tests.engine.training import member
from tests.processes import kill
from warploom.bench.kills import digest, run_once
from warploom.bench.kills import processes as commands
from warploom.engine.cli import main
from warploom.engine.errors import InputError
from warploom.engine.formats.model_directory import load_model, open_adapter
from warploom.engine.formats.model_writer import save_model
from warploom.engine.model import Transformer
from warploom.engine.serving import LLM
from warploom.engine.training import TrainConfig, train
from warploom.engine.training.callbacks import JsonLog
from warploom.engine.training.inputs import prepare
from warploom.engine.training.trainer import Trainer

WIDE = {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 32}
TOKENS = torch.arange(40).view(2, 20) % 13


@pytest.fixture
def lora(tiny, tmp_path):
    """A TrainConfig of an adapter on a small model of random weights."""

    def make(out="run", tied=True, **changes):
        base = tmp_path / f"base-{tied}"
        if not base.exists():
            inputs = prepare(tiny("data", model=WIDE | {"tie_embeddings": tied}), print)
            torch.manual_seed(0)
            save_model(Transformer(inputs.model), base, inputs.tokenizer)
        settings = {"init_from": str(base), "model": None, "tokenizer": "bpe", "lora": 4, "lr": 2e-2}
        return tiny(out, **{**settings, **changes})

    return make


def losses(config):
    return [line["loss"] for line in JsonLog.read(Path(config.out) / "log.jsonl") if "loss" in line]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"lora_embeddings": True, "lora_rslora": True}], ids=["plain", "embeddings"])
def test_lora_run_is_an_adapter_that_peft_opens(lora, tied, options):
    peft = pytest.importorskip("peft")
    config = lora(tied=tied, **options)
    result = train(config)
    assert losses(config)[-1] < losses(config)[0] - 0.1
    ours, theirs = load_model(result.directory, "cpu")[0], peft.AutoPeftModelForCausalLM.from_pretrained(config.out)
    with torch.no_grad():
        wanted, found = theirs(TOKENS).logits, ours(TOKENS)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not list(Path(config.out).glob("model*")), "the base stays where it is"


def test_adapter_of_another_base_is_refused(lora, tmp_path):
    """One of the same shape, that is; its own may have been rounded or tuned since."""
    base = Path(shutil.copytree(lora().init_from, tmp_path / "copy"))
    config = lora(init_from=str(base), steps=2)
    train(config)
    model, tokenizer = load_model(base, "cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.1 * torch.randn_like(p))
    save_model(model, base, tokenizer)
    assert load_model(config.out, "cpu")
    torch.manual_seed(7)
    save_model(Transformer(model.config), base, tokenizer)
    for opened in (lambda: load_model(config.out), lambda: LLM(base, device="cpu", adapters={"own": config.out})):
        with pytest.raises(InputError, match=r"was trained on another model than .*: the sample of base weights"):
            opened()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_trains_the_weights_that_are_merged(lora, dtype):
    """Bit for bit; what is not adapted does not change."""
    trainer = Trainer(lora(lora_targets=("q_proj", "down_proj"), dtype=dtype), [])
    trainer.run()
    (merged, _), (base, _) = (load_model(name, "cpu", dtype) for name in (trainer.config.out, trainer.config.init_from))
    for name, p in trainer.state.model.named_parameters():
        assert torch.equal(p, merged.get_parameter(name)), name
        assert torch.equal(p, base.get_parameter(name)) == (not name.endswith(("qkv.weight", "ffn.down.weight")))
    q, rest = (each.attention.qkv.weight.split(32)[0] for each in (merged.blocks[0], base.blocks[0]))
    assert not torch.equal(q, rest)
    assert trainer.state.trained_parameters == 2 * 4 * (32 + 32 + 32 + merged.config.ff_size)
    assert sorted(open_adapter(trainer.config.out).scales)[0] == "model.layers.0.mlp.down_proj"


@pytest.mark.timeout(300)
def test_lora_run_killed_ends_with_same_bits(lora, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole = lora("whole", steps=24, save_every=3, eval_every=9, lora_embeddings=True, ema=0.5)
    run_once(commands(), whole)
    assert digest(kill(commands(), whole, 3)) == digest(whole)


@pytest.mark.parametrize("grid", [{"dp": 2}, {"fsdp": 2}, {"dp": 2, "fsdp": 2}], ids="-".join)
def test_lora_processes_train_as_one(lora, processes, grid):
    """Half of the run in several processes, the rest in one: the curve of one process."""
    one = lora("one", steps=12, schedule="constant", grad_accum_steps=1, lora_embeddings=True, save_every=50)
    train(one)
    size = torch.tensor(list(grid.values())).prod().item()
    shared = dataclasses.replace(one, out=one.out.replace("one", "shared"), steps=6, **grid)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert processes(member.main, size, size=size, port=store.port, config=shared) == [0] * size
    assert losses(shared) == pytest.approx(losses(one)[:6], rel=2e-6)
    merged, _ = load_model(shared.out, "cpu")
    assert torch.isfinite(merged(TOKENS)).all()
    train(dataclasses.replace(one, out=shared.out, resume=True))
    assert losses(shared) == pytest.approx(losses(one), rel=2e-6)


def test_lora_resumed_with_another_rank_is_refused(lora):
    config = lora(steps=2)
    train(config)
    for changes, sentence in (({"lora": 8}, "lora=4, not 8"), ({"lora_targets": ("q_proj",)}, "lora_targets")):
        with pytest.raises(InputError, match=f"was trained with {sentence}"):
            train(dataclasses.replace(config, resume=True, steps=4, **changes))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"init_from": None}, r"lora=4 needs init_from \(--from\)"),
        ({"lora": 0}, "lora must be more than 0, not 0"),
        ({"tp": 2}, "lora=4 cannot be cut by tp=2: use fsdp or dp"),
        ({"lora": None, "lora_targets": ("q_proj",)}, "lora_targets is for an adapter: give lora, its rank"),
        ({"lora_targets": ("q_proj", "wq")}, "'wq', which is no linear layer of this model; there are: down_proj, "),
    ],
)
def test_lora_option_that_cannot_be_is_refused(lora, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        train(lora(**changes))


def test_adapter_is_exported_alone_or_merged(lora, tmp_path, capsys):
    config = lora(steps=3)
    train(config)
    assert main(["export", config.out, str(tmp_path / "alone")]) == 0
    assert main(["export", config.out, str(tmp_path / "merged"), "--merge"]) == 0
    assert "wrote" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {"config.json", "log.jsonl", "checkpoints"} & names
    models = [load_model(name, "cpu")[0] for name in (config.out, tmp_path / "alone", tmp_path / "merged")]
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert all(torch.equal(model(TOKENS), models[0](TOKENS)) for model in models)
    with pytest.raises(InputError, match="is an adapter itself: merge it first"):
        train(lora("again", init_from=config.out))
    assert main(["export", config.init_from, str(tmp_path / "no"), "--merge"]) == 2
    assert "is no adapter" in capsys.readouterr().err


def test_flags_make_an_adapter(tmp_path):
    from warploom.engine.cli.train import read

    flags = [
        "chats.jsonl",
        "--from",
        "base",
        "--lora",
        "16",
        "--lora-alpha",
        "32",
        "--lora-targets",
        "q_proj",
        "v_proj",
    ]
    config = read([*flags, "--lora-rslora"])
    assert isinstance(config, TrainConfig) and (config.lora, config.lora_alpha) == (16, 32.0)
    assert config.lora_targets == ("q_proj", "v_proj") and config.lora_rslora and not config.lora_embeddings
