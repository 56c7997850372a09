"""The stages that make the embedded base: text, vae, transformer, decoder, pack."""
