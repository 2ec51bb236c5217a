"""TRL's `GRPOTrainer` with transformers' generation."""

import time
from pathlib import Path

from . import Unavailable

NEEDS = ("trl", "datasets", "transformers")


def rl(base: Path, task: str, steps: int, sizes: dict) -> dict:
    """Run so many steps; return CPU seconds and mean reward of each."""
    try:
        from trl import GRPOConfig, GRPOTrainer
    except Exception as error:  # an import may fail in many ways
        raise Unavailable(str(error)) from error
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from ...engine.tasks import open_task

    problems = open_task(task)
    rows = [problems.row(0, index) for index in range(sizes["batch_size"] * steps)]
    data = Dataset.from_list([{"prompt": problems.question(row), "answer": row["answer"]} for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    samples = sizes["batch_size"] * sizes["group"]
    config = GRPOConfig(
        output_dir=str(base / "trl"), per_device_train_batch_size=samples, num_generations=sizes["group"],
        max_completion_length=sizes["max_tokens"], max_steps=steps, learning_rate=sizes["lr"],
        lr_scheduler_type="constant", adam_beta2=0.95, beta=0.0, temperature=1.0, scale_rewards=False,
        loss_type="dapo", logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, shuffle_dataset=False, seed=0,
    )  # fmt: skip
    seconds, rewards = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = getattr(self, "ended", time.process_time())

        def on_step_end(self, *_, **__):
            self.ended = time.process_time()
            seconds.append(self.ended - self.began)

        def on_log(self, args, state, control, logs=None, **_):
            if "reward" in logs:
                rewards.append(float(logs["reward"]))

    def score(completions, answer, **_):
        return [problems.score(text, {"answer": right}) for text, right in zip(completions, answer)]

    trainer = GRPOTrainer(
        model=model, args=config, reward_funcs=score, train_dataset=data, processing_class=tokenizer,
        callbacks=[Clock()],
    )  # fmt: skip

    def run():
        trainer.train()
        return seconds, rewards

    return {"trl": run}
