"""What to fetch, admit and evict: forecasts and prices in, decisions out."""
