"""The architectures that laws are tested on, as toys."""

ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "bloom", "opt", "qwen3", "gemma", "mistral")
