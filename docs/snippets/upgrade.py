import tempfile

import torch
from transformers import AutoModelForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM, Trainer, TrainingArguments

import loglinear

# A tiny model with random weights. Yours comes from AutoModelForCausalLM.from_pretrained(FOLDER).
heads = dict(num_attention_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2)
experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
layers = ["linear_attention", "full_attention"]
sizes = dict(vocab_size=256, hidden_size=32, num_hidden_layers=2, layer_types=layers, pad_token_id=0)
model = Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, **heads, **experts)).eval()

ids = torch.randint(1, 256, (8, 200))
with torch.no_grad():
    before = model(ids).logits
    print(loglinear.upgrade(model, num_levels=9))  # two lines: what is log-linear now, and what was added
    assert torch.allclose(model(ids).logits, before, atol=1e-4)

print({name: list(parameter.shape) for name, parameter in loglinear.new_parameters(model).items()})
rows = [{"input_ids": row, "labels": row} for row in ids]
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(folder, max_steps=2, learning_rate=1e-3, report_to=[], use_cpu=True)
    Trainer(model, arguments, train_dataset=rows).train()  # of the level weights alone
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)  # in any program that imports loglinear
print(loaded.generate(ids[:1, :50], max_new_tokens=10, do_sample=False))
