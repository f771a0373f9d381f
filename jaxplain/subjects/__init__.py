"""The models whose neurons are looked at: decoder, families, weights."""
