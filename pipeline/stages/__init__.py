"""One click command per stage: parse, load params, call the layer below, write. No arithmetic."""
