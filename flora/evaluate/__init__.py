"""How good an adapter is: pass@k of code, word error rate of speech, each with its interval, in rows that can be drawn."""
