"""reports/report.html: one self-contained page, put together from what the stages wrote."""
