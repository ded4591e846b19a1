-- The health of a Processor is in its conditions, which speak of the generation that the manager has seen.
local health = { status = "Progressing", message = "Waiting for Millrace to look at this Processor" }
local status = obj.status
if status == nil or status.conditions == nil or status.observedGeneration ~= obj.metadata.generation then
  return health
end

local conditions = {}
for _, condition in ipairs(status.conditions) do
  conditions[condition.type] = condition
end
local function is_true(condition)
  return condition ~= nil and condition.status == "True"
end
local ready, paused = conditions.Ready, conditions.Paused
if ready ~= nil then
  health.message = ready.reason
  if ready.message ~= nil and ready.message ~= "" then
    health.message = ready.reason .. ": " .. ready.message
  end
end

-- Nobody works on it, whatever else its conditions remember.
if is_true(paused) then
  return { status = "Suspended", message = paused.message }
end
if is_true(conditions.Stalled) then
  health.status = "Degraded"
  return health
end
-- Scaled to zero is as the spec says, and so Healthy.
if is_true(ready) then
  health.status = "Healthy"
end
return health
