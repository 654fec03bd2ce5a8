import tempfile

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from loglinear.models import CHAT_TEMPLATE, ByteTokenizer, LogLinearConfig, LogLinearForCausalLM

sizes = dict(hidden_size=64, num_hidden_layers=1, num_heads=2, key_dim=16, head_dim=32, num_levels=8)
tokenizer = ByteTokenizer()
tokenizer.chat_template = CHAT_TEMPLATE  # a base model has none
turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]

settings = SFTConfig(
    tempfile.mkdtemp(), max_steps=2, packing=True, max_length=128, report_to=[], use_cpu=True, bf16=False
)
trainer = SFTTrainer(
    LogLinearForCausalLM(LogLinearConfig(**sizes)),
    settings,
    train_dataset=Dataset.from_list([{"messages": turns}] * 8),
    processing_class=tokenizer,
)
trainer.train()
print(trainer.state.log_history[-1]["train_loss"])
