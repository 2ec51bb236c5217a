"""TRL's SFTTrainer with PEFT's LoRA."""

NEEDS = ("torch", "trl", "peft", "datasets")


def tune(job):
    """Its collator and loss on the same conversations, in its trainer's loop."""

    def build():
        import datasets
        import torch
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        datasets.disable_progress_bars()
        tokenizer = AutoTokenizer.from_pretrained(job.base)
        tokenizer.pad_token = "<|end|>"
        arguments = SFTConfig(
            output_dir=str(job.base / "trl"), per_device_train_batch_size=job.conversations, max_length=256,
            use_cpu=True, bf16=False, report_to=[], max_steps=1, gradient_checkpointing=False, disable_tqdm=True,
            assistant_only_loss=True,
        )  # fmt: skip
        adapter = None
        if job.lora:
            adapter = LoraConfig(
                r=job.lora, lora_alpha=2 * job.lora, target_modules="all-linear", task_type="CAUSAL_LM"
            )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32), args=arguments,
            processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(job.rows()), peft_config=adapter,
        )  # fmt: skip
        model = trainer.model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

        def step():
            loss = trainer.compute_loss(model, dict(batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    return {"TRL with PEFT" if job.lora else "TRL": build}
