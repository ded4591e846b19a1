local actions = {}

-- Suspended, the manager neither looks at it nor changes it. Messages go on.
if obj.spec.suspend == true then
  actions["resume"] = { ["iconClass"] = "fa fa-fw fa-play", ["displayName"] = "Resume" }
else
  actions["suspend"] = { ["iconClass"] = "fa fa-fw fa-pause", ["displayName"] = "Suspend" }
end

local ready = {}
if obj.status ~= nil and obj.status.conditions ~= nil then
  for _, condition in ipairs(obj.status.conditions) do
    if condition.type == "Ready" then
      ready = condition
    end
  end
end

-- Only while a plan of the present generation waits: what is approved is what status shows.
if obj.status ~= nil and obj.status.plan ~= nil and obj.status.observedGeneration == obj.metadata.generation
    and (ready.reason == "ApprovalPending" or ready.reason == "ApprovalOutdated") then
  actions["approve-plan"] = { ["iconClass"] = "fa fa-fw fa-check", ["displayName"] = "Approve the plan in status" }
end

-- Only while its database holds up the deletion: everything stays in the database.
if obj.metadata.deletionTimestamp ~= nil and ready.reason == "DeletionBlocked" then
  actions["abandon"] = { ["iconClass"] = "fa fa-fw fa-unlink", ["displayName"] = "Let go, and leave everything in the database" }
end

return actions
