"""What may be embedded item by item: images, tables, MMEB's pairs, shards."""
