"""Steps on a CPU as one call of compiled code, where there is a C compiler; torch is oracle and fallback."""
