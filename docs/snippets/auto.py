import tempfile

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from loglinear.models import ByteTokenizer, LogLinearConfig, LogLinearForCausalLM

sizes = dict(hidden_size=64, num_hidden_layers=1, num_heads=2, key_dim=16, head_dim=32, num_levels=8)
folder = tempfile.mkdtemp()
LogLinearForCausalLM(LogLinearConfig(**sizes)).save_pretrained(folder)  # writes loglinear_auto.py, too
ByteTokenizer().save_pretrained(folder)

# Another program needs no `import loglinear`, only the installed package:
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
write = pipeline("text-generation", folder, trust_remote_code=True)
print(write("import ", max_new_tokens=8)[0]["generated_text"])
