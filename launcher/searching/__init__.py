"""Two-stage search: FAISS finds candidates by single vectors, the fused similarity ranks them."""
