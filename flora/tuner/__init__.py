"""fLoRA as a PEFT method: what PEFT does with any method works with FloraConfig, and what LoRA alone has is refused by name.

model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), FloraConfig(r=4, target_modules=["c_attn"]))
…                                  # train it as any PEFT model
model.save_pretrained(folder)      # PeftModel.from_pretrained, flora.Engine and flora.formats read it
"""

from flora.tuner.config import FloraConfig, initial_factors
from flora.tuner.layer import FloraLinear
from flora.tuner.model import FloraModel
from flora.tuner.registration import register

register(FloraConfig, FloraModel)

__all__ = ["FloraConfig", "FloraLinear", "FloraModel", "initial_factors"]
