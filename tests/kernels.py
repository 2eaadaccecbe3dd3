import torch


def _keeps_scores() -> bool:
    """Whether attention on a CPU keeps all scores for its backward where heads share keys and values, as torch 2.8's does."""
    query, key = (torch.zeros(1, heads, 512, 8, requires_grad=True) for heads in (2, 1))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    return max(kept) >= 512 * 512


KEEPS_SCORES = _keeps_scores()
