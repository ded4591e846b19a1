local actions = {}

-- Suspended, the manager neither looks at it nor changes it. Messages go on.
if obj.spec.suspend == true then
  actions["resume"] = { ["iconClass"] = "fa fa-fw fa-play", ["displayName"] = "Resume" }
else
  actions["suspend"] = { ["iconClass"] = "fa fa-fw fa-pause", ["displayName"] = "Suspend" }
end

-- A suspended Processor keeps its pods as they are.
actions["restart"] = {
  ["iconClass"] = "fa fa-fw fa-recycle",
  ["displayName"] = "Restart pods",
  ["disabled"] = obj.spec.suspend == true,
}

return actions
