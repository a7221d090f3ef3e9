"""The parts of a CrossFormer: CEL, SDA and LDA, DPB, ACL."""
from .attention import GroupAttention as GroupAttention
from .block import CrossFormerBlock as CrossFormerBlock
from .cooling import AmplitudeCooling as AmplitudeCooling
from .embedding import CrossScaleEmbed as CrossScaleEmbed
from .permute import Permute as Permute
from .position_bias import DynamicPosBias as DynamicPosBias
