#include "grid_configs.h"

namespace fused_rin {
void append_float16_grid_instances(std::vector<BlockInstance>& instances) {
  MmaGridConfigs<device::Float16>::append(instances);
}
}  // namespace fused_rin
