"""What rectified_flow_table.py is made of: problems, runs of reflow on them, exact checks, pictures and the page."""
