"""What a person reads: rows of metrics, tables, plots, one HTML page. Everything is made from
metrics.json.
"""
