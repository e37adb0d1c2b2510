"""Parts of :class:`lightning_muon.MuonCLI`: short errors, help, and configs that are not overwritten."""

from lightning_muon.command_line.faults import short_faults
from lightning_muon.command_line.names import check_namespace, unregistered_name
from lightning_muon.command_line.parser import MuonArgumentParser
from lightning_muon.command_line.save import SaveConfigBeside

__all__ = ["MuonArgumentParser", "SaveConfigBeside", "check_namespace", "short_faults", "unregistered_name"]
