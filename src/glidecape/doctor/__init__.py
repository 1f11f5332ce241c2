"""Why a pair is slow: what is known of its draft's training, what is measured here, and what to change."""
