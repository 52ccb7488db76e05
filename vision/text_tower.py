"""SigLIP's other half: the text tower, the attention pool over patches, and the sigmoid loss.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343). Parameter names are
those of Hugging Face's SiglipModel.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from mm.common.attention import Segments
from mm.common.errors import UserError
from vision.init import siglip
from vision.vit import MLP, Encoder, VisionConfig, VisionTower, normalise


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Numbers of a text tower; `projection_size` must equal the vision tower's hidden size.

    initial_bias: where the loss's bias starts, -log of the pairs of a step (SigLIP: -10 for 32,768).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    projection_size: int
    max_positions: int = 64
    initial_bias: float = -10.0
    layer_norm_eps: float = 1e-6
    attention: str = "auto"
    activation_checkpointing: bool = False


class TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_positions, config.hidden_size)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.token_embedding(input_ids) + self.position_embedding(position_ids)


class TextTower(nn.Module):
    """Not causal; the last token of each text is its summary (SigLIP pads all texts to one length and
    attends to the padding: pass the padded rows as segments to repeat that exactly)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.projection_size)

    def forward(self, input_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """input_ids int64 [L], cu_seqlens int32 [M + 1] -> [M, projection]. Raises UserError for a text
        that is empty or longer than the position table."""
        where = Segments.of(cu_seqlens)
        if where.longest > self.config.max_positions or min(where.lengths, default=1) < 1:
            raise UserError(
                f"text tower: texts must have 1 to {self.config.max_positions} tokens, these have "
                f"{min(where.lengths)} to {where.longest}; cut the texts or raise max_positions"
            )
        starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
        x = self.embeddings(input_ids, torch.arange(len(input_ids), device=input_ids.device) - starts)
        x = self.final_layer_norm(self.encoder(x, where))
        return self.head(x[cu_seqlens[1:].long() - 1])


class PoolAttention(nn.Module):
    """One learned query over the patches of each picture, named as torch's MultiheadAttention."""

    def __init__(self, hidden_size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, probe: torch.Tensor, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """probe [D], x [N, D] in M runs of `lengths` int64 [M] -> [M, D]. Softmax in fp32."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q = F.linear(probe, weights[0], biases[0]).unflatten(-1, (self.heads, -1))  # [H, d]
        k, v = (
            F.linear(x, w, b).unflatten(-1, (self.heads, -1))
            for w, b in zip(weights[1:], biases[1:], strict=True)
        )
        scores = (k * q).sum(-1).float() * q.shape[-1] ** -0.5  # [N, H]
        of = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths)  # picture of each patch
        none = scores.new_full((len(lengths), self.heads), -torch.inf)
        top = none.scatter_reduce(0, of[:, None].expand_as(scores), scores.detach(), "amax")
        p = (scores - top[of]).exp()
        total = p.new_zeros(len(lengths), self.heads).index_add(0, of, p)
        weighted = (p / total[of])[..., None] * v.float()  # [N, H, d]
        pooled = weighted.new_zeros(len(lengths), *weighted.shape[1:]).index_add(0, of, weighted)
        return self.out_proj(pooled.flatten(1).to(x.dtype))


class PoolHead(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = PoolAttention(config.hidden_size, config.num_attention_heads)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        x = self.attention(self.probe[0, 0], x, lengths)
        return x + self.mlp(self.layernorm(x))


class ContrastiveModel(nn.Module):
    """Two towers and a temperature. The pool head is hung into the vision tower under SigLIP's name
    (`vision_model.head`), so that a SigLIP folder loads strictly; the tower's own forward ignores it."""

    def __init__(self, vision: VisionTower, text: TextTower):
        super().__init__()
        if text.config.projection_size != vision.config.hidden_size:
            raise UserError(
                f"text projection_size {text.config.projection_size} must equal the vision "
                f"hidden_size {vision.config.hidden_size}"
            )
        vision.head = PoolHead(vision.config)
        self.vision_model, self.text_model = vision, text
        self.logit_scale = nn.Parameter(torch.empty(1))  # log of the temperature
        self.logit_bias = nn.Parameter(torch.empty(1))

    def image_embeds(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """One vector of length 1 per grid row (picture or whole clip): fp32 [M, D].

        pixel_values: uint8 [N, 3 * patch * patch], or floats normalised already.
        """
        features = self.vision_model(normalise(pixel_values, self.logit_scale.dtype), grid_thw)
        head = cast(PoolHead, self.vision_model.head)
        return F.normalize(head(features, grid_thw.prod(1)).float(), dim=-1)

    def text_embeds(self, input_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """One vector of length 1 per text: fp32 [M, D]."""
        return F.normalize(self.text_model(input_ids, cu_seqlens).float(), dim=-1)

    def region_losses(
        self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, regions: torch.Tensor, input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor, words: torch.Tensor, rivals: torch.Tensor,
    ) -> dict[str, tuple[torch.Tensor, int]]:  # fmt: skip
        """What each patch of a region tells of it: the words of its name and the places it takes; what lies in no
        region is to say nothing. {"words": (fp32 sum, number of the regions' patches), "silence": (fp32 sum, number
        of patches in no region), "places": (fp32 sum, number of regions)}.

        The arguments are those of `mm.batch.RegionBatch`. A patch's logit for a word is its feature times that
        word's token embedding (the text tower's own table, so hidden_size must equal the vision tower's), for a
        place of its frame its feature times what the tower's own position table adds there. A patch's loss of words
        is, in each region it lies in, the mean over the tokens of the name of the cross entropy of that token among
        its rivals; of silence, in none, the divergence from all words alike. A region's loss of places is the mean
        over its patches of KL(uniform over the region's patches || softmax over all patches of its frame), in fp32.
        It trains the position table too.
        """
        features = self.vision_model(normalise(pixel_values, self.logit_scale.dtype), grid_thw)
        table = self.text_model.embeddings.token_embedding.weight[words]
        logits = (features @ table.to(features.dtype).T).float()  # [N, U]
        rows, of = region_patches(regions, grid_thw)
        named = word_losses(logits[rows], of, input_ids, cu_seqlens, words, rivals)
        bare = torch.ones(len(logits), dtype=torch.bool, device=logits.device).index_fill(0, rows, False)
        silent = logits[bare].logsumexp(-1) - logits[bare].mean(-1) - math.log(len(words))
        placed = self._place_loss(features, grid_thw, rows, of, len(regions))
        return {
            "words": (named.sum(), len(named)), "silence": (silent.sum(), len(silent)),
            "places": (placed, len(regions)),
        }  # fmt: skip

    def _place_loss(
        self, features: torch.Tensor, grid_thw: torch.Tensor, rows: torch.Tensor, of: torch.Tensor, n: int
    ) -> torch.Tensor:
        """Sum over n regions: features [N, D] of all patches; rows and of, int64 [K], from `region_patches`."""
        grids, features = grid_thw.tolist(), features.float()
        places = self.vision_model.embeddings.positions(grids)  # [N, D], the same in every frame
        lengths = [t * h * w for t, h, w in grids]
        pictures = zip(features.split(lengths), places.split(lengths), grids, strict=True)
        with torch.autocast(features.device.type, enabled=False):  # both halves of the divergence alike
            among = torch.cat([(f @ p[: h * w].T).logsumexp(-1) for f, p, (_, h, w) in pictures])
        # The mean over a region's patches of (feature times mean place) is (mean feature) times (mean place).
        feature, place = mean_of(features[rows], of, n), mean_of(places[rows], of, n)
        return (mean_of(among[rows], of, n) - (feature * place).sum(-1) - torch.bincount(of, minlength=n).log()).sum()

    def initial_weights(self, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, fp32 CPU tensor) of every parameter, one at a time: for whoever fills sharded parameters."""
        for name, p in self.named_parameters():
            if name == "logit_bias":
                yield name, torch.full(p.shape, self.text_model.config.initial_bias)
            else:
                yield name, siglip(name, p.shape, seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fresh weights that depend on `seed` and each parameter's name only, on any device."""
        for name, value in self.initial_weights(seed):
            self.get_parameter(name).copy_(value)


def region_patches(regions: torch.Tensor, grid_thw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(row of the packed patches, region) of every patch of every region, int64 [K] each.

    regions int64 [R, 6]: row of the grid, its frame, then top, left, bottom, right in patches, the last two
    exclusive.
    """
    starts, device = (grid_thw.prod(1).cumsum(0) - grid_thw.prod(1)).tolist(), regions.device
    grids, rows = grid_thw.tolist(), []
    for picture, frame, top, left, bottom, right in regions.tolist():
        _, height, width = grids[picture]
        lines = (frame * height + torch.arange(top, bottom, device=device)[:, None]) * width
        rows.append((starts[picture] + lines + torch.arange(left, right, device=device)).flatten())
    sizes = torch.tensor([len(r) for r in rows], device=device)
    return torch.cat(rows), torch.arange(len(rows), device=device).repeat_interleave(sizes)


def word_losses(
    logits: torch.Tensor, of: torch.Tensor, input_ids: torch.Tensor, cu_seqlens: torch.Tensor, words: torch.Tensor,
    rivals: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """fp32 [K]: of every patch of every region, given its logits [K, U] for the words and its region `of`, the mean
    over the tokens of the region's name of the cross entropy of that token among its rivals."""
    patch, token = each_with_each(of, cu_seqlens)
    shown, wanted = logits[patch], torch.searchsorted(words, input_ids)[token]
    among = shown.masked_fill(~rivals[token], -torch.inf).logsumexp(-1)
    return mean_of(among - shown.gather(1, wanted[:, None])[:, 0], patch, len(of))


def mean_of(values: torch.Tensor, of: torch.Tensor, n: int) -> torch.Tensor:
    """[K, ...], int64 [K] -> [n, ...]: the mean of the values of each of n groups, 0 of an empty one."""
    count = torch.bincount(of, minlength=n).clamp(min=1).view(-1, *[1] * (values.dim() - 1))
    return values.new_zeros(n, *values.shape[1:]).index_add(0, of, values) / count


def each_with_each(of: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every patch of a region (`of`, int64 [K]) with every token of that region's name: (patch, token), int64 [P]."""
    n = cu_seqlens.diff().long()[of]
    patch = torch.arange(len(of), device=of.device).repeat_interleave(n)
    within = torch.arange(len(patch), device=of.device) - (n.cumsum(0) - n)[patch]
    return patch, cu_seqlens.long()[of][patch] + within


def sigmoid_loss(
    image: torch.Tensor, text: torch.Tensor, logit_scale: torch.Tensor, logit_bias: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Every pair is a yes/no question: -log sigmoid(z (s <image, text> + b)), z = 1 on the diagonal, else -1.

    Args: image, text: [n, D] of length 1; logit_scale: log of s.
    Returns: (fp32 sum over all n * n pairs, n); their quotient is SigLIP's loss.
    """
    logits = image.float() @ text.float().T * logit_scale.float().exp() + logit_bias.float()
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum(), len(logits)
