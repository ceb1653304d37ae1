"""Which rows make up batch n: computed, never stored."""
