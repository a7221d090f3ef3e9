"""The parts of a CrossFormer: CEL, SDA and LDA, DPB, ACL."""
from .attention import GroupAttention as GroupAttention
from .attention import share_indices as share_indices
from .block import CrossFormerBlock as CrossFormerBlock
from .cooling import AmplitudeCooling as AmplitudeCooling
from .embedding import CrossScaleEmbed as CrossScaleEmbed
from .grouping import LDA_GROUPINGS as LDA_GROUPINGS
from .position_bias import DynamicPosBias as DynamicPosBias
