"""Methods that growth is compared against; they are not recommended."""
