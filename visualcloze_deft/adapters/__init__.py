"""DEFT, PaRa and LoRA: attached, saved, merged, exported. peft is used here alone."""
