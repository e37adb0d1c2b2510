"""Which parameter of a module goes to which optimizer, and why."""

from lightning_muon.partition.classify import partition_parameters
from lightning_muon.partition.layout import MatrixLayout
from lightning_muon.partition.partition import Partition
from lightning_muon.partition.roles import Group, ParameterAssignment, Role
from lightning_muon.partition.rules import ParameterRule

__all__ = [
    "Group",
    "MatrixLayout",
    "ParameterAssignment",
    "ParameterRule",
    "Partition",
    "Role",
    "partition_parameters",
]
