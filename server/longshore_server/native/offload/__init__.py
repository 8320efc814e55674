"""Where KV blocks go when the device has no room: memories in tiers, copies, and when a copy pays."""
