"""The names of FLUX's layers, and how many tokens of text it reads."""

BLOCKS = r"(?:single_)?transformer_blocks\.\d+"

# Attention and feed-forward layers of both block kinds; modulation and embedders stay as they are.
FLUX_LAYERS = (
    r".*transformer_blocks\.\d+\."
    r"(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|ff\.net\.(0\.proj|2)|ff_context\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)

MAX_TEXT_TOKENS = 512  # FLUX's T5 length
