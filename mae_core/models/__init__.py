"""Encoder, decoder and what is built from them."""
