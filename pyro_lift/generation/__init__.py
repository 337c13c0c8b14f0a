"""Text from a network under an adapter's weights: decoding, averaging over draws, consensus, and scores of text."""
