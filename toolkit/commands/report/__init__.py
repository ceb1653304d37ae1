"""`toolkit report`: runs as one HTML file that needs no network, and as PNGs."""

from toolkit.commands.report.board import BoardServer
from toolkit.commands.report.page import write_html
from toolkit.commands.report.pictures import write_pngs
from toolkit.commands.report.reading import Report, read_report
from toolkit.config.paths import local_path

__all__ = ["BoardServer", "Report", "local_path", "read_report", "write_html", "write_pngs"]
