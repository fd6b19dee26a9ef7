"""What people look at: the page of a comparison and the page of an inspection, each one HTML file that opens offline."""

from pondera.report._shell import check_path

__all__ = ["check_path"]
